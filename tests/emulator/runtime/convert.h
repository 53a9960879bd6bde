// 16-bit floats as the hardware reads them.
#pragma once
#include <stdint.h>
#include <string.h>

namespace emu {

float widen_fp16_slowly(uint16_t bits);

inline float widen_fp16(uint16_t bits) {
  static const float* const table = [] {
    static float values[1 << 16];
    for (int i = 0; i < 1 << 16; ++i) values[i] = widen_fp16_slowly(static_cast<uint16_t>(i));
    return values;
  }();
  return table[bits];
}

inline float widen_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

}  // namespace emu
