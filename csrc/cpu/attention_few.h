// Attention of a few queries (decoding): each query by itself, keys and values read where they lie.
// A panel of queries, which the general way fills, would be empty but for these.
#pragma once

#include "attention_tile.h"
#include "blocks.h"
#include "dropout.h"
#include "gptk.h"
#include "vec_math.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

constexpr int64_t FEW_QUERIES = 4;  // from here on a panel pays

template <typename A, typename T> GPTK_INLINE A dot_product(const A* a, const T* b, int64_t n) {
  Accumulators<A> sum;
  for_lanes<A>(
      n, GPTK_LANES { sum.part[k] = fma(load(a + i, lanes), load(b + i, lanes), sum.part[k]); });
  return sum.total();
}

// The running softmax of one query over blocks of keys.
template <typename A> struct RunningSoftmax {
  A max = static_cast<A>(-__builtin_inf()), sum = 0;

  // n scores, in an array padded to a vector, become exp(score - max); returns the factor by which
  // what came before has shrunk.
  A add(A* scores, int64_t n) {
    constexpr int W = Lanes<A>::value;
    const Vec<A> minus_inf = broadcast(static_cast<A>(-__builtin_inf()));
    Vec<A> largest = minus_inf, total = zero<A>();
    if (n % W) {
      A* last = scores + n / W * W;
      store(last, only(load(last), static_cast<int>(n % W), minus_inf));
    }
    for (int64_t j = 0; j < n; j += W) largest = gptk::GPTK_ISA::max(load(scores + j), largest);
    const A before = max, block_max = hmax(largest);
    max = block_max > before ? block_max : before;
    const A shift = max == minus_inf[0] ? A(0) : max;  // -inf - -inf would be NaN
    for (int64_t j = 0; j < n; j += W) {
      const Vec<A> e = exp_flush(load(scores + j) - shift);
      store(scores + j, e);
      total += e;
    }
    const A factor = exp_flush(broadcast(before - shift))[0];
    sum = sum * factor + hsum(total);
    return factor;
  }
};

// out (n,) = factor * out + sum_j p[j] v[j, :], a vector group of columns at a time.
template <typename A, typename T>
void add_values(const A* p, const T* v, int64_t v_t, int64_t keys, int64_t n, A factor, A* out) {
  constexpr int W = Lanes<A>::value, GROUP = 4;
  int64_t c = 0;
  for (; c + GROUP * W <= n; c += GROUP * W) {
    Vec<A> sum[GROUP];
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; g++) sum[g] = load(out + c + g * W) * factor;
    for (int64_t j = 0; j < keys; j++) {
      const Vec<A> weight = broadcast(p[j]);
#pragma GCC unroll 4
      for (int g = 0; g < GROUP; g++) sum[g] = fma(weight, load(v + j * v_t + c + g * W), sum[g]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; g++) store(out + c + g * W, sum[g]);
  }
  const auto column = [&](auto lanes) __attribute__((always_inline)) {
    Vec<A> sum = load(out + c, lanes) * factor;
    for (int64_t j = 0; j < keys; j++)
      sum = fma(broadcast(p[j]), load(v + j * v_t + c, lanes), sum);
    store(out + c, sum, lanes);
  };
  for (; c + W <= n; c += W) column(All());
  if (c < n) column(static_cast<int>(n - c));
}

// One query; scratch: D + Dv values of A.
template <typename T, typename A = Acc<T>>
void attend(const gptk_attention_forward_args& a, int64_t b, int64_t h, int64_t query, A* scratch) {
  constexpr int64_t KEYS = attention_plan::FORWARD_KEYS;
  const int64_t kv_head = h / (a.H / a.Hkv), row = (b * a.H + h) * a.Tq + query;
  const T* q = static_cast<const T*>(a.q) + b * a.q_b + h * a.q_h + query * a.q_t;
  const T* k = static_cast<const T*>(a.k) + b * a.k_b + kv_head * a.k_h;
  const T* v = static_cast<const T*>(a.v) + b * a.v_b + kv_head * a.v_h;
  const Range keys = visibility(a).keys(query);
  const uint64_t threshold = gptk_keep_threshold(a.dropout_p);
  const A keep_factor = static_cast<A>(keep_scale(a.dropout_p)), scale = static_cast<A>(a.scale);
  A *query_row = scratch, *sums = scratch + a.D;
  A p[KEYS], keep[KEYS];
  for_lanes<A>(
      a.D, [&](int64_t i, auto lanes, int) { store(query_row + i, load(q + i, lanes), lanes); });
  for (int64_t c = 0; c < a.Dv; c++) sums[c] = 0;
  RunningSoftmax<A> softmax;
  for (int64_t key0 = keys.begin / KEYS * KEYS; key0 < keys.end; key0 += KEYS) {
    const Range part = {larger(keys.begin, key0), smaller(keys.end, key0 + KEYS)};
    const int64_t n = part.end - part.begin;
    for (int64_t j = 0; j < n; j++)
      p[j] = dot_product(query_row, k + (part.begin + j) * a.k_t, a.D) * scale;
    const A factor = softmax.add(p, n);
    if (a.dropout_p > 0) {
      keep_scale_row(a.seed, static_cast<uint64_t>(row), key0, part.end - key0, threshold,
                     keep_factor, keep);
      for (int64_t j = 0; j < n; j++) p[j] *= keep[part.begin - key0 + j];
    }
    add_values(p, v + part.begin * a.v_t, a.v_t, n, a.Dv, factor, sums);
  }
  const bool no_keys = keys.begin >= keys.end;  // seen keys whose scores are all -inf give NaN
  static_cast<A*>(a.lse)[row] =
      no_keys ? static_cast<A>(-__builtin_inf()) : softmax.max + log(softmax.sum);
  const A inverse = no_keys ? A(0) : A(1) / softmax.sum;
  T* out = static_cast<T*>(a.out) + ((b * a.Tq + query) * a.H + h) * a.Dv;
  for_lanes<A>(a.Dv, [&](int64_t i, auto lanes, int) {
    store(out + i, load(sums + i, lanes) * inverse, lanes);
  });
}

template <typename T> void forward_few(const gptk_attention_forward_args& a, int threads) {
  using A = Acc<T>;
  const int64_t each = attention_plan::attention_forward_scratch(a.Tq, a.D, a.Dv);
  parallel_for_threads(a.B * a.H * a.Tq, threads, [&](int64_t item, int thread) {
    attend<T>(a, item / a.Tq / a.H, item / a.Tq % a.H, item % a.Tq,
              static_cast<A*>(a.scratch) + thread * each);
  });
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
