// Stores of several words at once, also where the compiler has lost track of the alignment.
#pragma once

// To global memory.
__device__ __forceinline__ void st_global_v2(void* address, const unsigned (&x)[2]) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(address), "r"(x[0]), "r"(x[1]) : "memory");
}
__device__ __forceinline__ void st_global_v4(float* address, const float (&x)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "l"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}
