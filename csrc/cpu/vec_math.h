// exp, the normal tail, tanh, log, and the product that random numbers are made of.
// NaN stays NaN; overflow gives infinity, underflow 0, as in libm.
//
// float:  polynomials fitted to the function by Chebyshev interpolation in 40-digit arithmetic.
// double: libm, lane by lane. Double is there for gradcheck, not for speed.
#pragma once

#include "vec.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

template <typename A> struct ValueSlope {
  Vec<A> value, slope;
};

// exp(r) - 1 = r + r^2 P(r), |r| <= ln(2)/2
GPTK_INLINE VecF expm1_reduced(VecF r) {
  VecF p = broadcast(0.00139262508f);
  p = fma(p, r, broadcast(0.00836323288f));
  p = fma(p, r, broadcast(0.0416665542f));
  p = fma(p, r, broadcast(0.166665767f));
  p = fma(p, r, broadcast(0.5f));
  return fma(r * r, p, r);
}
GPTK_INLINE VecF exp_reduced(VecF r) { return expm1_reduced(r) + 1.0f; }

// exp(x) = 2^n exp(r), n = round(x / ln 2).
// Max error 1 ulp for results >= 2^-126; gradual underflow below.
GPTK_INLINE VecF exp(VecF x) {
  x = max(broadcast(-104.0f), min(broadcast(89.0f), x));  // beyond: 0, infinity
  const VecF round = broadcast(0x1.8p23f);  // adding it leaves an integer in the low bits
  VecF shifted = fma(x, broadcast(0x1.715476p0f), round);
  VecI32 n = (VecI32)shifted - (VecI32)round;
  VecF n_float = shifted - round;
  VecF r = fma(n_float, broadcast(-0x1.62e4p-1f), x);  // ln 2 in two parts, the first one exact
  r = fma(n_float, broadcast(-0x1.7f7d1cp-20f), r);
  VecI32 half = n >> 1;  // 2^n in two factors: n itself may be out of the exponent's range
  return exp_reduced(r) * (VecF)((half + 127) << 23) * (VecF)((n - half + 127) << 23);
}

// The same for softmax weights, x <= 88: half the instructions around the polynomial. Results below
// 2^-126 are exactly 0.
GPTK_INLINE VecF exp_flush(VecF x) {
  x = max(broadcast(-88.0f), x);  // n >= -127, whose factor 2^n comes out as 0
  const VecF round = broadcast(0x1.8p23f);
  VecF shifted = fma(x, broadcast(0x1.715476p0f), round);
  VecF n_float = shifted - round;
  VecF r = fma(n_float, broadcast(-0x1.62e4p-1f), x);
  r = fma(n_float, broadcast(-0x1.7f7d1cp-20f), r);
  return exp_reduced(r) * (VecF)(((VecI32)shifted << 23) + (127 << 23));
}

GPTK_INLINE VecD exp(VecD x) {
  for (int i = 0; i < Lanes<double>::value; i++) x[i] = __builtin_exp(x[i]);
  return x;
}
GPTK_INLINE VecD exp_flush(VecD x) { return exp(x); }

// 1 / x for normal x with a normal result (else 0 is a possible answer); error below 1 ulp.
GPTK_INLINE VecF reciprocal(VecF x) {
#if defined(__AVX512F__)
  const VecF r = _mm512_rcp14_ps(x);  // relative error below 2^-14, squared by a Newton step
  return fma(fma(-x, r, broadcast(1.0f)), r, r);
#else
  return 1.0f / x;
#endif
}
GPTK_INLINE VecD reciprocal(VecD x) { return 1.0 / x; }

// P(Z > x) = erfc(x / sqrt 2) / 2 for x >= 0, given density = exp(-x^2 / 2).
// float: density * k Q(k), k = 1 / (1 + x / 4); relative error below 3e-7.
GPTK_INLINE VecF normal_tail(VecF x, VecF density) {
  VecF k = reciprocal(fma(x, broadcast(0.25f), broadcast(1.0f)));
  VecF q = broadcast(0.02980736043f);
  q = fma(q, k, broadcast(-0.1727586022f));
  q = fma(q, k, broadcast(0.3375926862f));
  q = fma(q, k, broadcast(-0.2535974459f));
  q = fma(q, k, broadcast(0.2351274911f));
  q = fma(q, k, broadcast(0.01852258075f));
  q = fma(q, k, broadcast(0.1074966382f));
  q = fma(q, k, broadcast(0.09797934731f));
  q = fma(q, k, broadcast(0.09982993827f));
  return density * k * q;
}

GPTK_INLINE VecD normal_tail(VecD x, VecD) {
  for (int i = 0; i < Lanes<double>::value; i++)
    x[i] = 0.5 * __builtin_erfc(x[i] * 0.70710678118654752440);
  return x;
}

// tanh(x) and its slope 1 - tanh(x)^2, from e = exp(-2 |x|) and e - 1, neither by cancellation:
// tanh |x| = (1 - e) / (1 + e), slope 4 e / (1 + e)^2.
// float: relative error below 3e-7, of the slope 4e-7 + |x| 2e-7; slopes below 2^-124 may be 0.
GPTK_INLINE ValueSlope<float> tanh_slope(VecF x) {
  const VecF y = max(broadcast(-88.0f), max(x, -x) * -2.0f);
  const VecF round = broadcast(0x1.8p23f);
  const VecF shifted = fma(y, broadcast(0x1.715476p0f), round);
  const VecF n_float = shifted - round;
  VecF r = fma(n_float, broadcast(-0x1.62e4p-1f), y);
  r = fma(n_float, broadcast(-0x1.7f7d1cp-20f), r);
  const VecF scale = (VecF)(((VecI32)shifted << 23) + (127 << 23)), q = expm1_reduced(r);
  const VecF e = fma(scale, q, scale), e_less_1 = fma(scale, q, scale - 1.0f);
  const VecF k = reciprocal(2.0f + e_less_1), size = -e_less_1 * k;
  return {select(x < 0, -size, size), (e * k) * k * 4.0f};
}

GPTK_INLINE ValueSlope<double> tanh_slope(VecD x) {
  const VecD e = exp(max(x, -x) * -2.0), k = 1.0 / (1.0 + e);
  for (int i = 0; i < Lanes<double>::value; i++) x[i] = __builtin_tanh(x[i]);
  return {x, (e * k) * k * 4.0};
}

// Lane by lane, the 64-bit product of the low halves of a and b; the high halves do not count.
GPTK_INLINE VecU64 multiply_low_halves(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return (VecU64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (VecU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

GPTK_INLINE float log(float x) { return __builtin_logf(x); }
GPTK_INLINE double log(double x) { return __builtin_log(x); }

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
