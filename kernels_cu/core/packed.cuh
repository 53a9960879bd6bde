// Sequences packed one after the other in one tensor (docs/packed.md): the one that a thread block works on.
#pragma once

// One of them, as packed/blocks.cu describes it. The rows past the last make up one more, of which none is in use.
struct Sequence {
  long long first_query, first_key;  // its first rows of the packed tensors
  int query_rows, key_rows;          // how many it has
  int queries;                       // those in use, of which …
  int sees_begin, sees_end;          // … queries [sees_begin, sees_end) see a key
  int keys;                          // those that a query sees: none from here on
  int diagonal;                      // query i is at the position of key i + diagonal
  int first_block;                   // its first block of queries, among those of all sequences
};

// A block of queries, or of keys, of one sequence. Lists of them end with some of no sequence, −1; after those that there
// can be at most, one more has in `block` how many are of sequences.
struct PackedBlock {
  int sequence, block;
};

template <bool kVarlen>
struct PackedArrays {};
template <>
struct PackedArrays<true> {
  const Sequence* sequences;  // (batch + 1,)
  const PackedBlock* blocks;  // those that the kernel's thread blocks work on, the longest sequences' first
};

// Block `block` of all becomes that of sequence `batch`, which is returned: one without rows if there is none. What is past
// the last sequence has no slope or sink of its own, and needs none: it counts as the first.
template <class Params>
__device__ __forceinline__ Sequence find_sequence(const Params& call, int& block, int& batch) {
  const PackedBlock found = call.blocks[block];
  if (found.sequence < 0) return {};
  block = found.block;
  const Sequence sequence = call.sequences[found.sequence];
  batch = sequence.queries == 0 ? 0 : found.sequence;
  return sequence;
}

// What a kernel takes for its parameters: those of the call or, with kVarlen, a copy that `restrict_to` makes those of one
// sequence. A plain kernel has no copy, and no function returns it a reference either: its code stays what it is.
template <bool kVarlen, class Params>
struct ChosenParamsOf {
  using Type = const Params&;
};
template <class Params>
struct ChosenParamsOf<true, Params> {
  using Type = Params;
};
template <class Params>
using ParamsOf = typename ChosenParamsOf<Config::kVarlen, Params>::Type;

// For queries [first_row, end_row) of the sequence, which are counted from first_row; `call` are the parameters of the call,
// and `sequence` is a Sequence or what else has its keys and diagonal.
template <class Params, class Call, class Sequence>
__device__ __forceinline__ void restrict_to(Params& params, const Call& call, const Sequence& sequence, int first_row,
                                            int end_row) {
  params.seqlen_q = end_row - first_row;
  params.seqlen_k_visible = sequence.keys;
  params.causal_offset = call.causal_offset + sequence.diagonal + first_row;
  params.window_offset = call.window_offset + sequence.diagonal + first_row;
  params.diagonal = sequence.diagonal;
  params.first_key = max(0, params.window_offset);
}

// What a backward counts queries from: the first that sees a key, so that those before it are not read. Dropout's draws are
// for blocks of 16 queries, so that it needs them whole.
__device__ __forceinline__ int first_row_of(const Sequence& sequence) {
  return Config::kDropout ? sequence.sees_begin / 16 * 16 : sequence.sees_begin;
}
