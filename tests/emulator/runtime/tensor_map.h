// Tensor maps: the emulator's own contents of CUtensorMap's 128 bytes, made by its cuTensorMapEncodeTiled.
#pragma once
#include <stdint.h>

#include "report.h"

namespace emu {

constexpr int kMostAxes = 5;

struct TensorMap {
  uint64_t magic;
  uint64_t address;
  uint64_t strides[kMostAxes - 1];  // in bytes, of all axes but the innermost
  uint32_t shape[kMostAxes];
  uint32_t box[kMostAxes];
  uint16_t rank, element_bytes;
  uint32_t swizzle;  // CUtensorMapSwizzle: 0 none, 1 to 3 for 32, 64 and 128 bytes
};
static_assert(sizeof(TensorMap) <= 128, "fits a CUtensorMap");

// CUresult of the driver's function: 0, or 1 (CUDA_ERROR_INVALID_VALUE) for what it documents as not allowed.
int encode_tensor_map(void* map, int data_type, uint32_t rank, const void* address, const uint64_t* shape,
                      const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
                      int swizzle, int l2_promotion, int fill);

TensorMap decode_tensor_map(const void* map, int rank, Site site);

// The swizzle acts on 16-byte chunks of the shared address: bits 4 to 6 take bits 7 to 9.
inline uint32_t swizzled(uint32_t address, uint32_t mode) {
  constexpr uint32_t kMasks[] = {0, 0x10, 0x30, 0x70};
  return address ^ (address >> 3 & kMasks[mode]);
}

}  // namespace emu
