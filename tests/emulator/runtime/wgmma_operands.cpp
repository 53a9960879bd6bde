#include "wgmma_operands.h"

#include <string.h>

#include "convert.h"
#include "machine.h"
#include "memory.h"
#include "tensor_map.h"

namespace emu {

constexpr int kChunkElements = 8;  // 16 bytes of 16-bit floats

static float to_float(const Product& product, uint16_t bits) {
  return product.operands.bf16 ? widen_bf16(bits) : widen_fp16(bits);
}

struct Descriptor {  // PTX ISA, "Matrix descriptor format" of wgmma
  uint32_t start, leading, stride, base_offset, layout;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7),
        layout(bits >> 62) {}
};

// Of the 128-byte swizzle: rows of 128 bytes, eight to a group. k inside: a row of the matrix is a row of memory,
// groups of eight rows are `stride` apart. k outside ("transposed"): a row of memory is one k and 64 rows of the matrix;
// groups of eight k are `stride` and groups of 64 rows `leading` apart. The swizzle acts on the address so found.
static uint32_t chunk_address(const Descriptor& descriptor, bool transposed, int row, int k) {
  if (transposed) {
    return descriptor.start + row / 64 * descriptor.leading + k / 8 * descriptor.stride + k % 8 * 128 + row % 64 * 2;
  }
  return descriptor.start + row / 8 * descriptor.stride + row % 8 * 128 + k * 2;
}

void read_matrix(const Product& product, Block& block, int actor, uint64_t bits, bool transposed, int first, int rows,
                 float (*out)[kMostColumns]) {
  constexpr uint32_t kSwizzle128 = 1;
  const Descriptor descriptor(bits);
  if (descriptor.layout != kSwizzle128 || descriptor.base_offset) {
    fault(kLaunch, "the emulator models wgmma descriptors with the 128-byte swizzle and base offset 0 only, " +
                       at(product.site));
  }
  Access access{&block, actor, product.step, &product.clock, false, true, true, product.site};
  access.may_be_dropped = true;
  const int row_step = transposed ? kChunkElements : 1, k_step = transposed ? 1 : kChunkElements;
  for (int row = 0; row < rows; row += row_step) {
    for (int k = 0; k < 16; k += k_step) {
      const uint32_t address = chunk_address(descriptor, transposed, first + row, k);
      uint16_t chunk[kChunkElements];
      memcpy(chunk, shared_at(access, swizzled(address, 3), sizeof chunk, sizeof chunk), sizeof chunk);
      for (int i = 0; i < kChunkElements; ++i) {
        (transposed ? out[k][row + i] : out[k + i][row]) = to_float(product, chunk[i]);
      }
    }
  }
}

void read_fragments(const Product& product, float (*out)[kMostColumns]) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
      out[k][row] = to_float(product, static_cast<uint16_t>(product.a_values[lane][i]));
      out[k + 1][row] = to_float(product, static_cast<uint16_t>(product.a_values[lane][i] >> 16));
    }
  }
}

}  // namespace emu
