// How a kernel walks a (batch, seqlen, heads, head_dim) tensor, or a (batch, heads, seqlen) one.
#pragma once

struct Strides {
  long long batch, row, head;  // in elements; the last axis of a tensor with a head_dim is contiguous
};
