// ldmatrix, stmatrix and mma.sync. In all fragments lane l holds, of an 8×8 matrix, row l / 4 and columns 2 · (l % 4)
// and the next.
#include <string.h>

#include "convert.h"
#include "machine.h"
#include "memory.h"

namespace emu {

struct MatrixArgument {
  uint32_t* registers;
  uint32_t address;  // of row lane % 8 of matrix lane / 8
  int matrices;
  bool transposed;
};

using Matrix = uint16_t[8][8];

static uint32_t get_fragment(const Matrix& matrix, int lane, bool transposed) {
  const int i = lane / 4, j = lane % 4 * 2;
  return transposed ? matrix[j][i] | static_cast<uint32_t>(matrix[j + 1][i]) << 16
                    : matrix[i][j] | static_cast<uint32_t>(matrix[i][j + 1]) << 16;
}

static void set_fragment(Matrix& matrix, int lane, bool transposed, uint32_t bits) {
  const int i = lane / 4, j = lane % 4 * 2;
  (transposed ? matrix[j][i] : matrix[i][j]) = static_cast<uint16_t>(bits);
  (transposed ? matrix[j + 1][i] : matrix[i][j + 1]) = static_cast<uint16_t>(bits >> 16);
}

// Where row `i` of matrix `m` lies, after the checks.
static unsigned char* matrix_row(const Lanes& lanes, int m, int i, bool write) {
  const int lane = m * 8 + i;
  const Access access = access_by(lanes.thread(lane), write, lanes.site);
  return shared_at(access, own_address(lanes.block, lanes.of<MatrixArgument>(lane).address, lanes.site), 16, 16);
}

static void count_rows(const Lanes& lanes, int m, bool write) {
  if (!options.count_banks) return;
  uint32_t offsets[8];
  for (int i = 0; i < 8; ++i) {
    offsets[i] = own_address(lanes.block, lanes.of<MatrixArgument>(m * 8 + i).address, lanes.site) - kSharedBase;
  }
  count_matrix_rows(offsets, write, lanes.site);
}

static void do_load(const Lanes& lanes) {
  const MatrixArgument& first = lanes.of<MatrixArgument>(0);
  for (int m = 0; m < first.matrices; ++m) {
    Matrix matrix;
    for (int i = 0; i < 8; ++i) memcpy(matrix[i], matrix_row(lanes, m, i, false), 16);
    count_rows(lanes, m, false);
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      lanes.of<MatrixArgument>(lane).registers[m] = get_fragment(matrix, lane, first.transposed);
    }
  }
}

static void do_store(const Lanes& lanes) {
  const MatrixArgument& first = lanes.of<MatrixArgument>(0);
  for (int m = 0; m < first.matrices; ++m) {
    Matrix matrix;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      set_fragment(matrix, lane, first.transposed, lanes.of<MatrixArgument>(lane).registers[m]);
    }
    for (int i = 0; i < 8; ++i) memcpy(matrix_row(lanes, m, i, true), matrix[i], 16);
    count_rows(lanes, m, true);
  }
}

constexpr uint32_t kWholeWarp = 0xffffffffu;

void load_matrices(uint32_t* registers, int matrices, bool transposed, uint32_t address) {
  MatrixArgument x{registers, address, matrices, transposed};
  meet(kWholeWarp, {"ldmatrix", do_load, matrices * 2 + transposed, true}, __builtin_return_address(0), &x);
}

void store_matrices(const uint32_t* registers, int matrices, bool transposed, uint32_t address) {
  MatrixArgument x{const_cast<uint32_t*>(registers), address, matrices, transposed};
  meet(kWholeWarp, {"stmatrix", do_store, matrices * 2 + transposed, true}, __builtin_return_address(0), &x);
}

// ---- mma.sync: A is four 8×8 matrices (rows, then rows + 8, then columns + 8), B two, the accumulator two of floats

struct MultiplyArgument {
  float* d;
  const uint32_t *a, *b;
};

template <float (*kToFloat)(uint16_t)>
static void do_multiply(const Lanes& lanes) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const MultiplyArgument& x = lanes.of<MultiplyArgument>(lane);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, k = pair + i / 2 * 8;
      a[row][k] = kToFloat(static_cast<uint16_t>(x.a[i]));
      a[row][k + 1] = kToFloat(static_cast<uint16_t>(x.a[i] >> 16));
      d[row][pair + i / 2] = x.d[i % 2 * 2 + i / 2];
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = kToFloat(static_cast<uint16_t>(x.b[i]));
      b[pair + i * 8 + 1][group] = kToFloat(static_cast<uint16_t>(x.b[i] >> 16));
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[row][n] += a[row][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const MultiplyArgument& x = lanes.of<MultiplyArgument>(lane);
    for (int i = 0; i < 4; ++i) x.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

void multiply_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bf16) {
  MultiplyArgument x{d, a, b};
  const Work work = bf16 ? do_multiply<widen_bf16> : do_multiply<widen_fp16>;
  meet(kWholeWarp, {"mma.sync", work, bf16, true}, __builtin_return_address(0), &x);
}

}  // namespace emu
