// Bias + activation forward, and its backward with the bias gradient: the epilogues of linear and
// mlp; gelu itself is the case without bias.
//
//   pre = x + bias      y = activation(pre)            x, pre, y, dy (M, N), bias (N,)
//   dpre = dy * activation'(pre)      dbias = sum over rows of dpre
//
//   gelu:       y = x P(Z <= x)                                 slope = P(Z <= x) + x density(x)
//   gelu_tanh:  y = x sigmoid(2u), u = sqrt(2/pi)(x + 0.044715 x^3)    slope = s + 2 x s (1 - s) u'
// Beyond +-LIMIT both are x or 0, with slope 1 or 0, to the last bit; so nothing overflows and
// gelu(-inf) = 0.
//
// Threads: pieces of rows; with dbias, `groups` of rows (a function of M) into `partial`, then over
// groups in order.
#include "blocks.h"
#include "vec_math.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

using Forward = gptk_activation_forward_args;
using Backward = gptk_activation_backward_args;

template <typename A> GPTK_INLINE Vec<A> clamp(Vec<A> x, A limit) {  // NaN stays NaN
  return max(broadcast<A>(-limit), min(broadcast<A>(limit), x));
}

template <typename A> struct ValueSlope {
  Vec<A> value, slope;
};

struct Identity {
  template <typename A> static GPTK_INLINE ValueSlope<A> at(Vec<A> x) { return {x, zero<A>() + 1}; }
};

struct GeluErf {
  template <typename A> static GPTK_INLINE ValueSlope<A> at(Vec<A> x) {
    const A limit = sizeof(A) == sizeof(float)
                        ? A(13)
                        : A(38);  // P(Z > limit) is just above the smallest number
    const Vec<A> inside = clamp<A>(x, limit);
    const Vec<A> density = exp(inside * inside * A(-0.5));
    const Vec<A> tail = normal_tail(select(inside < 0, -inside, inside), density);
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
    const Vec<A> e = exp(inside * fma(square, broadcast<A>(-two_c * cubic), broadcast<A>(-two_c)));
    const Vec<A> s = 1 / (1 + e);  // sigmoid(2u); 1 - s = e s
    const Vec<A> two_du = fma(square, broadcast<A>(two_c * 3 * cubic), broadcast<A>(two_c));
    const Vec<A> slope = fma(inside * (e * s) * s, two_du, s);
    return {select(x < -limit, zero<A>(), x * s), select(x < -limit, zero<A>(), slope)};
  }
};

template <typename A, typename Activation>
void forward_piece(const Forward& a, int64_t row, int64_t begin, int64_t n) {
  A x_scratch[BLOCK], bias_scratch[BLOCK], pre_scratch[BLOCK], y_scratch[BLOCK];
  const int64_t offset = row * a.N + begin;
  const A* x = read_block(a.x, a.x_dtype, offset, n, x_scratch);
  const A* bias = a.bias ? read_block(a.bias, a.bias_dtype, begin, n, bias_scratch) : nullptr;
  A* pre = a.pre ? target_block(a.pre, a.y_dtype, offset, pre_scratch) : nullptr;
  A* y = target_block(a.y, a.y_dtype, offset, y_scratch);
  for_lanes<A>(
      n, GPTK_LANES {
        Vec<A> z = load(x + i, lanes);
        if (bias) z += load(bias + i, lanes);
        if (pre) store(pre + i, z, lanes);
        store(y + i, Activation::template at<A>(z).value, lanes);
      });
  if (pre) write_block(a.pre, a.y_dtype, offset, n, pre);
  write_block(a.y, a.y_dtype, offset, n, y);
}

template <typename A, typename Activation> void forward_with(const Forward& a) {
  const int64_t per_row = (a.N + BLOCK - 1) / BLOCK;
  parallel_rows(a.M * per_row, threads_for(a.M * a.N, a.threads), [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; piece++) {
      const int64_t row = piece / per_row, begin = piece % per_row * BLOCK;
      forward_piece<A, Activation>(a, row, begin, min(a.N - begin, BLOCK));
    }
  });
}

// dbias: this group's sums (N,), or null.
template <typename A, typename Activation>
void backward_piece(const Backward& a, int64_t row, int64_t begin, int64_t n, A* dbias) {
  A dy_scratch[BLOCK], pre_scratch[BLOCK], dpre_scratch[BLOCK], y_scratch[BLOCK];
  const int64_t offset = row * a.N + begin;
  const A* dy = read_block(a.dy, a.dy_dtype, offset, n, dy_scratch);
  const A* pre = a.pre ? read_block(a.pre, a.pre_dtype, offset, n, pre_scratch)
                       : dy;  // identity: not looked at
  A* dpre = a.dpre ? target_block(a.dpre, a.dpre_dtype, offset, dpre_scratch) : nullptr;
  A* y = a.y ? target_block(a.y, a.dpre_dtype, offset, y_scratch) : nullptr;
  A* db = dbias ? dbias + begin : nullptr;
  for_lanes<A>(
      n, GPTK_LANES {
        const ValueSlope<A> f = Activation::template at<A>(load(pre + i, lanes));
        const Vec<A> d = load(dy + i, lanes) * f.slope;
        if (y) store(y + i, f.value, lanes);
        if (dpre) store(dpre + i, d, lanes);
        if (db) store(db + i, load(db + i, lanes) + d, lanes);
      });
  if (dpre) write_block(a.dpre, a.dpre_dtype, offset, n, dpre);
  if (y) write_block(a.y, a.dpre_dtype, offset, n, y);
}

template <typename A, typename Activation> void backward_with(const Backward& a) {
  const int threads = threads_for(a.M * a.N, a.threads);
  if (!a.dbias) {
    const int64_t per_row = (a.N + BLOCK - 1) / BLOCK;
    parallel_rows(a.M * per_row, threads, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; piece++) {
        const int64_t row = piece / per_row, begin = piece % per_row * BLOCK;
        backward_piece<A, Activation>(a, row, begin, min(a.N - begin, BLOCK), nullptr);
      }
    });
    return;
  }
  A* partial = static_cast<A*>(a.partial);  // (groups, N)
  parallel_for(a.groups, threads, [&](int64_t group) {
    A* dbias = partial + group * a.N;
    for (int64_t j = 0; j < a.N; j++) dbias[j] = 0;
    const int64_t end = group_begin(a.M, a.groups, group + 1);
    for (int64_t row = group_begin(a.M, a.groups, group); row < end; row++)
      for (int64_t begin = 0; begin < a.N; begin += BLOCK)
        backward_piece<A, Activation>(a, row, begin, min(a.N - begin, BLOCK), dbias);
  });
  sum_groups<A>(a.dbias, a.dbias_dtype, partial, a.groups, a.N, a.threads);
}

template <typename A> void forward(const Forward& a) {
  if (a.activation == GPTK_GELU)
    forward_with<A, GeluErf>(a);
  else if (a.activation == GPTK_GELU_TANH)
    forward_with<A, GeluTanh>(a);
  else
    forward_with<A, Identity>(a);
}

template <typename A> void backward(const Backward& a) {
  if (a.activation == GPTK_GELU)
    backward_with<A, GeluErf>(a);
  else if (a.activation == GPTK_GELU_TANH)
    backward_with<A, GeluTanh>(a);
  else
    backward_with<A, Identity>(a);
}

}  // namespace

void activation_forward(const gptk_activation_forward_args& a) {
  GPTK_WITH_ACC(a.x_dtype, forward, a);
}
void activation_backward(const gptk_activation_backward_args& a) {
  GPTK_WITH_ACC(a.dy_dtype, backward, a);
}

}  // namespace GPTK_ISA
}  // namespace gptk
