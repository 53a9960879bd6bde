// Hides a value from the compiler.
#pragma once

// No instruction: x may be anything afterwards, so what is computed from it is not moved out of a loop, where it would take
// more registers than x.
__device__ __forceinline__ void make_opaque(unsigned& x) { asm volatile("" : "+r"(x)); }
