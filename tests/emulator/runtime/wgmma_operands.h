// Where wgmma finds its operands: matrix descriptors and fragments.
#pragma once
#include "wgmma.h"

namespace emu {

// `rows` rows (of M or N), from row `first` on, of the 16-wide matrix a descriptor names, as floats: out[k][row].
void read_matrix(const Product& product, Block& block, int actor, uint64_t descriptor, bool transposed, int first,
                 int rows, float (*out)[kMostColumns]);

// The A operand from registers.
void read_fragments(const Product& product, float (*out)[kMostColumns]);

// Row and column of register `index` of lane `lane` of an accumulator.
inline int accumulator_row(int lane, int index) { return lane / 4 + index / 2 % 2 * 8; }
inline int accumulator_column(int lane, int index) { return index / 4 * 8 + lane % 4 * 2 + index % 2; }

}  // namespace emu
