// A number and its derivative by the score: a formula evaluated on these gives its own gradient (forward mode). Whatever
// does not depend on the score is a float or an integer. Where the slope is not used the compiler drops it.
#pragma once
#include "core/tanh.cuh"

struct Dual {
  float value, slope;

  __device__ __forceinline__ Dual(float x) : value(x), slope(0.0f) {}
  __device__ __forceinline__ Dual(float x, float s) : value(x), slope(s) {}

  // int(x), bool(x), !x, x && y and x ? y : z take the value.
  __device__ __forceinline__ explicit operator int() const { return static_cast<int>(value); }
  __device__ __forceinline__ explicit operator bool() const { return value != 0.0f; }
};

// a / b for |b| from 2^−126 to 2^126, to 2 units in the last place: of what is the same for all elements, the reciprocal
// is taken once.
__device__ __forceinline__ float quotient(float a, float b) { return a * rcp_approx(b); }

// float(x) of a formula, which has the slope of x.
__device__ __forceinline__ float cuflash_float(float x) { return x; }
__device__ __forceinline__ Dual cuflash_float(const Dual& x) { return x; }

// f(x), whose derivative is `derivative`.
__device__ __forceinline__ Dual chained(const Dual& x, float value, float derivative) {
  return {value, x.slope * derivative};
}

__device__ __forceinline__ Dual operator+(const Dual& a) { return a; }
__device__ __forceinline__ Dual operator-(const Dual& a) { return {-a.value, -a.slope}; }

__device__ __forceinline__ Dual operator+(const Dual& a, const Dual& b) { return {a.value + b.value, a.slope + b.slope}; }
__device__ __forceinline__ Dual operator+(const Dual& a, float b) { return {a.value + b, a.slope}; }
__device__ __forceinline__ Dual operator+(float a, const Dual& b) { return b + a; }

__device__ __forceinline__ Dual operator-(const Dual& a, const Dual& b) { return {a.value - b.value, a.slope - b.slope}; }
__device__ __forceinline__ Dual operator-(const Dual& a, float b) { return {a.value - b, a.slope}; }
__device__ __forceinline__ Dual operator-(float a, const Dual& b) { return {a - b.value, -b.slope}; }

__device__ __forceinline__ Dual operator*(const Dual& a, const Dual& b) {
  return {a.value * b.value, a.slope * b.value + a.value * b.slope};
}
__device__ __forceinline__ Dual operator*(const Dual& a, float b) { return {a.value * b, a.slope * b}; }
__device__ __forceinline__ Dual operator*(float a, const Dual& b) { return b * a; }

__device__ __forceinline__ Dual operator/(const Dual& a, const Dual& b) {
  const float value = quotient(a.value, b.value);
  return {value, quotient(a.slope - value * b.slope, b.value)};
}
__device__ __forceinline__ Dual operator/(const Dual& a, float b) { return {quotient(a.value, b), quotient(a.slope, b)}; }
__device__ __forceinline__ Dual operator/(float a, const Dual& b) {
  const float value = quotient(a, b.value);
  return {value, quotient(-value * b.slope, b.value)};
}

#define CUFLASH_COMPARISON(op)                                                                                     \
  __device__ __forceinline__ bool operator op(const Dual& a, const Dual& b) { return a.value op b.value; }         \
  __device__ __forceinline__ bool operator op(const Dual& a, float b) { return a.value op b; }                     \
  __device__ __forceinline__ bool operator op(float a, const Dual& b) { return a op b.value; }
CUFLASH_COMPARISON(<)
CUFLASH_COMPARISON(>)
CUFLASH_COMPARISON(<=)
CUFLASH_COMPARISON(>=)
CUFLASH_COMPARISON(==)
CUFLASH_COMPARISON(!=)
#undef CUFLASH_COMPARISON

__device__ __forceinline__ Dual exp(const Dual& x) {
  const float y = expf(x.value);
  return chained(x, y, y);
}
__device__ __forceinline__ Dual exp2(const Dual& x) {
  const float y = exp2f(x.value);
  return chained(x, y, y * kLn2);
}
__device__ __forceinline__ Dual log(const Dual& x) { return chained(x, logf(x.value), rcp_approx(x.value)); }
__device__ __forceinline__ Dual log2(const Dual& x) { return chained(x, log2f(x.value), quotient(kLog2E, x.value)); }
__device__ __forceinline__ Dual tanh(const Dual& x) {
  const float y = tanh_from_ex2(x.value * (2.0f * kLog2E));
  return chained(x, y, 1.0f - y * y);
}
__device__ __forceinline__ Dual sin(const Dual& x) { return chained(x, sinf(x.value), cosf(x.value)); }
__device__ __forceinline__ Dual cos(const Dual& x) { return chained(x, cosf(x.value), -sinf(x.value)); }
__device__ __forceinline__ Dual sqrt(const Dual& x) {
  const float y = sqrtf(x.value);
  return chained(x, y, quotient(0.5f, y));
}
__device__ __forceinline__ Dual rsqrt(const Dual& x) {
  const float y = rsqrtf(x.value);
  return chained(x, y, quotient(-0.5f * y, x.value));
}
__device__ __forceinline__ Dual floor(const Dual& x) { return floorf(x.value); }
__device__ __forceinline__ Dual ceil(const Dual& x) { return ceilf(x.value); }
__device__ __forceinline__ Dual fabs(const Dual& x) { return x.value < 0.0f ? -x : x; }
__device__ __forceinline__ Dual abs(const Dual& x) { return fabs(x); }

// Of equal ones the first, and of a NaN and a number the number, as fmin and fmax of floats.
__device__ __forceinline__ Dual fmin(const Dual& a, const Dual& b) {
  return a.value <= b.value || b.value != b.value ? a : b;
}
__device__ __forceinline__ Dual fmax(const Dual& a, const Dual& b) {
  return a.value >= b.value || b.value != b.value ? a : b;
}
#define CUFLASH_OF_TWO(name, function)                                                                  \
  __device__ __forceinline__ Dual name(const Dual& a, float b) { return function(a, Dual(b)); }         \
  __device__ __forceinline__ Dual name(float a, const Dual& b) { return function(Dual(a), b); }
CUFLASH_OF_TWO(fmin, fmin)
CUFLASH_OF_TWO(fmax, fmax)
CUFLASH_OF_TWO(min, fmin)
CUFLASH_OF_TWO(max, fmax)
#undef CUFLASH_OF_TWO
__device__ __forceinline__ Dual min(const Dual& a, const Dual& b) { return fmin(a, b); }
__device__ __forceinline__ Dual max(const Dual& a, const Dual& b) { return fmax(a, b); }

__device__ __forceinline__ Dual pow(const Dual& a, float b) {
  return chained(a, powf(a.value, b), b == 0.0f ? 0.0f : b * powf(a.value, b - 1.0f));
}
__device__ __forceinline__ Dual pow(float a, const Dual& b) {
  const float y = powf(a, b.value);
  return chained(b, y, y == 0.0f ? 0.0f : y * logf(a));
}
__device__ __forceinline__ Dual pow(const Dual& a, const Dual& b) {
  const Dual by_base = pow(a, b.value);
  if (b.slope == 0.0f) return by_base;  // a negative base has no logarithm
  return {by_base.value, by_base.slope + pow(a.value, b).slope};
}
