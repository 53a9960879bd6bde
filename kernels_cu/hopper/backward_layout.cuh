// Sizes, tiles and shared memory of hopper/backward.cu.
#pragma once
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
constexpr bool kDqWarpgroup = Config::kDqWarpgroup;
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
using QRing = Ring<kStages, QTile::kBytes>;
using DoutRing = FilledRing<kStages, DoutTile::kBytes>;  // emptied with Q
using DsRing = Ring<kDsStages, DsTile::kBytes>;
using KRing = Ring<1, KTile::kBytes>;
using VRing = FilledRing<1, VTile::kBytes>;  // emptied with K
using Part = DqPart<Element, kBlockM, kHeadDim, kBlockN, kDqColumns>;
static_assert(kDqWarpgroup || Part::kParts == kMainWarpgroups, "a part of dQ for each main warpgroup");

constexpr int kVOffset = KTile::kBytes;  // K is at 0
constexpr int kQOffset = kVOffset + VTile::kBytes;
constexpr int kDoutOffset = kQOffset + kStages * QTile::kBytes;
constexpr int kDsOffset = kDoutOffset + kStages * DoutTile::kBytes;
constexpr int kFloatsBytes = kBlockM * 4;  // lse or delta of a query block
constexpr int kLseOffset = kDsOffset + kDsStages * DsTile::kBytes;
constexpr int kDeltaOffset = kLseOffset + kStages * kFloatsBytes;
constexpr int kBarriersOffset = kDeltaOffset + kStages * kFloatsBytes;
constexpr int kKvBarriersOffset = kBarriersOffset + QRing::kBarrierBytes + DoutRing::kBarrierBytes + DsRing::kBarrierBytes;
constexpr int kBlockSlotOffset = kKvBarriersOffset + KRing::kBarrierBytes + VRing::kBarrierBytes;
static_assert(kBlockSlotOffset + 8 == Config::kSharedBytes, "the host's map is the same");

// dV and dK leave by way of a main warpgroup's own panels of dS, of which each slot has one.
constexpr bool kStagedTogether = VTile::kPanels + KTile::kPanels <= kDsStages;
static_assert(VTile::kPanels <= kDsStages && KTile::kPanels <= kDsStages, "a slot for each panel");
