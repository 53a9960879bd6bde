// Sizes, tiles and the first part of shared memory of hopper/backward.cu and hopper/backward_narrow.cu.
#pragma once
#include "core/modified_probabilities.cuh"
#include "hopper/gradient_products.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/tile.cuh"

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;
constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kStages = Config::kStages;
constexpr int kDsStages = 2;
constexpr int kDqColumns = Config::kDqColumns;  // of one product dS K
constexpr int kMainWarpgroups = 2;
constexpr int kWarpgroupThreads = 4 * kWarpSize;
constexpr int kThreads = (1 + kMainWarpgroups) * kWarpgroupThreads;
constexpr int kNTiles = kBlockM / 8;
static_assert(kBlockN == 64 * kMainWarpgroups && kBlockM % 64 == 0, "whole wgmma tiles");
static_assert(kStages >= 2, "a visit's tiles land while another's are in use");

using QTile = PanelTile<kBlockM, kHeadDim>;
using DoutTile = PanelTile<kBlockM, kHeadDimV>;
using KTile = PanelTile<kBlockN, kHeadDim>;
using VTile = PanelTile<kBlockN, kHeadDimV>;
using DsTile = PanelTile<kBlockM, kBlockN>;
using BiasTile = PanelTile<kBlockM, kBlockN>;  // if kBiasTiles, comes with Q
using QRing = Ring<kStages, QTile::kBytes>;
using DoutRing = FilledRing<kStages, DoutTile::kBytes>;  // emptied with Q
using DsRing = Ring<kDsStages, DsTile::kBytes>;
using Part = DqPart<Element, kBlockM, kHeadDim, kBlockN, kDqColumns>;

constexpr int kVOffset = KTile::kBytes;  // K is at 0
constexpr int kQOffset = kVOffset + VTile::kBytes;
constexpr int kDoutOffset = kQOffset + kStages * QTile::kBytes;
constexpr int kDsOffset = kDoutOffset + kStages * DoutTile::kBytes;
constexpr int kFloatsBytes = kBlockM * 4;  // lse or delta of a query block
constexpr int kPOffset = kDsOffset + kDsStages * DsTile::kBytes;
constexpr int kBiasOffset = kPOffset + (kTwoPs ? DsTile::kBytes : 0);  // if dS takes another P than dV, that one
constexpr int kBiasBytes = Config::kBiasTiles ? BiasTile::kBytes : 0;
constexpr int kLseOffset = kBiasOffset + kStages * kBiasBytes;
constexpr int kDeltaOffset = kLseOffset + kStages * kFloatsBytes;
constexpr int kBarriersOffset = kDeltaOffset + kStages * kFloatsBytes;
constexpr int kKvBarriersOffset = kBarriersOffset + QRing::kBarrierBytes + DoutRing::kBarrierBytes + DsRing::kBarrierBytes;
