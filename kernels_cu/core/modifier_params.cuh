// What a kernel is told of the modifiers of a call (docs/modifiers.md): their arrays, how to read them, and numbers.
#pragma once
#include "core/mod_args.cuh"

struct OperandStrides {
  long long batch, head, row, key;  // in elements; 0 where the operand is broadcast
};

struct HeadStrides {
  long long batch, head;
};

// Of core/mask_tiles.cuh, in its words.
struct TileBits;
struct TileStrides {
  long long batch, head;
  long long query_block;          // 0 if the mask is broadcast along the queries
  long long of_keys, key_block;   // where the words of key blocks start, and from one to the next
};

struct ModifierNumbers {
  // Addresses come first: each call has its own, the rest belongs to the plan.
  const void* alibi_slopes;         // (batch or 1, heads_q)
  const void* bias;                 // (batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k)
  const unsigned char* mask;        // likewise, of bools
  const void* key_padding;          // (batch,)
  const void* query_padding;        // (batch,)
  const void* sinks;                // (batch or 1, heads_q)
  const void* seed;                 // the array, or with kSeedIsValue the number itself
  const TileBits* mask_tiles;       // what core/mask_tiles.cuh reads, written by fa2/mask_summary.cu
  const int* keys_seen;             // (batch or 1, heads_q or 1, seqlen_k) of the mask: some query sees this key

  OperandStrides bias_strides, mask_strides;
  TileStrides mask_tiles_strides;
  HeadStrides keys_seen_strides, slopes_strides, sinks_strides;
  long long key_padding_stride, query_padding_stride, seed_stride;
  int slopes_bytes, sinks_bytes;                 // of an element: 4, or 2 for Element
  int key_padding_bytes, query_padding_bytes;    // 4 or 8
  int seed_kind;                                 // SeedKind in core/dropout.cuh
  int diagonal;                                  // query i is at the position of key i + diagonal
  int window_offset;                             // query i sees keys j >= i + window_offset
  int first_key;                                 // keys before it are seen by no query
  int blind_rows;                                // queries before this one see no key
  float softcap_log2;                            // the cap in base 2
  float softcap_rate;                            // 2·log2(e)·scale / cap: tanh(scale·s / cap) from 2^(rate·s)
  unsigned dropped_below;                        // 2¹⁶ times as much: an element is dropped if its 16 random bits are less
  float kept_scale;                              // 1 / (1 − p), p as rounded
  int unused;                                    // 8-byte alignment, in sight
};

// With the arguments of formulas.
template <int kModArgs>
struct FormulaNumbers : ModArgAddresses<kModArgs>, ModifierNumbers, ModArgLayouts<kModArgs> {};

// A plain program has none, and the parameters that derive from this stay what they are; so do those of a program without
// formulas. Members are read in templates only, under if constexpr, so that a plain program need not have them.
template <bool kModified, int kModArgs>
struct ChosenParams {
  using Type = FormulaNumbers<kModArgs>;
};
template <>
struct ChosenParams<true, 0> {
  using Type = ModifierNumbers;
};
template <int kModArgs>
struct ChosenParams<false, kModArgs> {
  struct Type {};
};

template <bool kModified>
using ModifierParams = typename ChosenParams<kModified, Config::kModArgs>::Type;

// Some keys are hidden from some queries element by element.
constexpr bool kMasks = Config::kMask || Config::kMaskMod;
