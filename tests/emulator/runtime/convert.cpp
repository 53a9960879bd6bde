#include "convert.h"

#include <math.h>

#include "kernel_api.h"

namespace emu {

constexpr uint16_t kCanonicalNan16 = 0x7fff;  // what cvt gives for any NaN, in both formats

static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

float widen_fp16_slowly(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float magnitude = exponent == 0 ? ldexpf(mantissa, -24) : ldexpf(1024 + mantissa, exponent - 25);
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  return bits >> 15 ? -magnitude : magnitude;
}

// Round to nearest even; beyond 65504 + half a step to infinity.
uint16_t to_fp16(float x) {
  if (isnan(x)) return kCanonicalNan16;
  const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float magnitude = fabsf(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(lrintf(magnitude * 0x1p24f));  // subnormal
  const uint32_t bits = bits_of(magnitude);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - ((127 - 15) << 10));
}

float from_fp16(uint16_t bits) { return widen_fp16(bits); }

uint16_t to_bf16(float x) {
  if (isnan(x)) return kCanonicalNan16;
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

float exp2_approx_ftz(float x) { return flush(exp2f(flush(x))); }

float log2_approx_ftz(float x) { return log2f(flush(x)); }

}  // namespace emu
