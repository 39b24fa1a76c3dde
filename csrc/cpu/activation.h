// Activations and their slopes, vector by vector.
//
//   gelu:       y = x P(Z <= x)                                 slope = P(Z <= x) + x density(x)
//   gelu_tanh:  y = x sigmoid(2u), u = sqrt(2/pi)(x + 0.044715 x^3)    slope = s + 2 x s (1 - s) u'
// Beyond +-LIMIT both are x or 0, with slope 1 or 0, to the last bit; so nothing overflows and
// gelu(-inf) = 0.
#pragma once

#include "vec_math.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

template <typename A> GPTK_INLINE Vec<A> clamp(Vec<A> x, A limit) {  // NaN stays NaN
  return max(broadcast<A>(-limit), min(broadcast<A>(limit), x));
}

struct Identity {
  template <typename A> static GPTK_INLINE ValueSlope<A> at(Vec<A> x) { return {x, zero<A>() + 1}; }
};

struct GeluErf {
  template <typename A> static GPTK_INLINE ValueSlope<A> at(Vec<A> x) {
    const A limit = sizeof(A) == sizeof(float)
                        ? A(13)
                        : A(38);  // P(Z > limit) is just above the smallest number
    const Vec<A> inside = clamp<A>(x, limit);
    const Vec<A> density = exp_flush(inside * inside * A(-0.5));  // of float, above 2^-122
    const Vec<A> tail = normal_tail(max(inside, -inside), density);
    const Vec<A> cdf = select(inside < 0, tail, 1 - tail);
    const Vec<A> slope = fma(inside * A(0.398942280401432677940), density, cdf);
    return {select(x < -limit, zero<A>(), x * cdf), select(x < -limit, zero<A>(), slope)};
  }
};

struct GeluTanh {
  template <typename A> static GPTK_INLINE ValueSlope<A> at(Vec<A> x) {
    const A limit = sizeof(A) == sizeof(float)
                        ? A(10)
                        : A(20);  // exp(2u(limit)) is just below the largest number
    const A two_c = A(1.59576912160573071176), cubic = A(0.044715);
    const Vec<A> inside = clamp<A>(x, limit), square = inside * inside;
    const Vec<A> e =
        exp_flush(inside * fma(square, broadcast<A>(-two_c * cubic), broadcast<A>(-two_c)));
    const Vec<A> s = reciprocal(1 + e);  // sigmoid(2u); 1 - s = e s
    const Vec<A> two_du = fma(square, broadcast<A>(two_c * 3 * cubic), broadcast<A>(two_c));
    const Vec<A> slope = fma(inside * (e * s) * s, two_du, s);
    return {select(x < -limit, zero<A>(), x * s), select(x < -limit, zero<A>(), slope)};
  }
};

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
