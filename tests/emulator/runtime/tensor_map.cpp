#include "tensor_map.h"

#include <string.h>

namespace emu {

constexpr uint64_t kMagic = 0x70616d20756d65ull;
constexpr int kInvalidValue = 1;
constexpr uint64_t kStrideLimit = 1ull << 40;
constexpr uint32_t kMostBox = 256;

static int element_bytes(int data_type) {  // CUtensorMapDataType
  constexpr int kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return data_type >= 0 && data_type < 13 ? kBytes[data_type] : 0;
}

int encode_tensor_map(void* map, int data_type, uint32_t rank, const void* address, const uint64_t* shape,
                      const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
                      int swizzle, int /*l2_promotion*/, int fill) {
  const int bytes = element_bytes(data_type);
  if (!bytes || rank < 1 || rank > kMostAxes || reinterpret_cast<uintptr_t>(map) % 64) return kInvalidValue;
  if (reinterpret_cast<uintptr_t>(address) % 16 || interleave || fill) return kInvalidValue;  // the last two: not modelled
  if (swizzle < 0 || swizzle > 3) return kInvalidValue;
  TensorMap made{};
  made.magic = kMagic;
  made.address = reinterpret_cast<uint64_t>(address);
  made.rank = static_cast<uint16_t>(rank);
  made.element_bytes = static_cast<uint16_t>(bytes);
  made.swizzle = static_cast<uint32_t>(swizzle);
  for (uint32_t i = 0; i < rank; ++i) {
    if (shape[i] == 0 || shape[i] > 1ull << 32 || box[i] == 0 || box[i] > kMostBox || element_strides[i] != 1) {
      return kInvalidValue;
    }
    made.shape[i] = static_cast<uint32_t>(shape[i]);
    made.box[i] = box[i];
    if (i == 0) continue;
    if (strides[i - 1] % 16 || strides[i - 1] >= kStrideLimit) return kInvalidValue;
    made.strides[i - 1] = strides[i - 1];
  }
  const uint32_t inner = box[0] * bytes;
  if (inner % 16 || (swizzle && inner > 16u << swizzle)) return kInvalidValue;
  memset(map, 0, 128);
  memcpy(map, &made, sizeof made);
  return 0;
}

TensorMap decode_tensor_map(const void* map, int rank, Site site) {
  TensorMap decoded;
  memcpy(&decoded, map, sizeof decoded);
  if (decoded.magic != kMagic) fault(kLaunch, "TMA with something that is no tensor map " + at(site));
  if (decoded.rank != rank) {
    fault(kLaunch, format("TMA with %d coordinates and a tensor map of %d axes %s", rank, decoded.rank,
                          at(site).c_str()));
  }
  return decoded;
}

}  // namespace emu
