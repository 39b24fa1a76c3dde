// Cross-entropy of rows of logits, forward and backward.
//
//   lse = log sum exp z      loss = lse - (1 - s) z[target] - s / V sum(z)      z (N, V), lse (N,)
//   dz = dloss (softmax(z) - (1 - s) [column == target] - s / V)
//
// z_loss adds z_loss lse^2 to the loss, and so makes softmax(z) in dz (1 + 2 z_loss lse) times it.
// Under a softcap z = softcap tanh(logits / softcap), formed block by block, and
// dlogits = dz (1 - (z / softcap)^2).
//
// Forward reads a row once, block by block: when a block holds a new maximum, the sum so far is
// rescaled. Backward takes exp(z - lse); where logits are float it also divides by the row's sum of
// these, because lse, rounded to float, is off by up to 2^-24 |lse| (for |lse| = 1e4 that is 6e-4
// in every probability).
// A NaN logit makes its own row NaN. A row of -inf has lse = -inf.
// Threads: rows; every sum has a fixed order within its row.
#include "blocks.h"
#include "vec_math.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

using Forward = gptk_cross_entropy_forward_args;
using Backward = gptk_cross_entropy_backward_args;

// z = softcap tanh(logits / softcap) and its slope.
template <typename A> struct Softcap {
  A cap, inverse;
  explicit Softcap(double softcap)
      : cap(static_cast<A>(softcap)), inverse(static_cast<A>(1 / softcap)) {}

  GPTK_INLINE ValueSlope<A> at(Vec<A> logits) const {
    const ValueSlope<A> y = tanh_slope(logits * inverse);
    return {y.value * cap, y.slope};
  }
};

// A block of z from a block of logits; they may be the same memory.
template <typename A>
const A* capped_block(const Softcap<A>& softcap, const A* logits, int64_t n, A* z) {
  for_lanes<A>(n, GPTK_LANES { store(z + i, softcap.at(load(logits + i, lanes)).value, lanes); });
  return z;
}

template <typename A> struct RowSums {
  A max;
  double sum_exp;  // of exp(z - max)
  double sum;      // of z, only if asked for
};

template <typename A, bool CAPPED> RowSums<A> row_sums(const Forward& a, int64_t row) {
  A scratch[BLOCK];
  const Vec<A> minus_infinity = broadcast(-static_cast<A>(__builtin_inf()));
  RowSums<A> r = {minus_infinity[0], 0, 0};
  for (int64_t begin = 0; begin < a.V; begin += BLOCK) {
    const int64_t n = min(a.V - begin, BLOCK);
    const A* z = read_block(a.logits, a.logits_dtype, row * a.logits_stride + begin, n, scratch);
    if constexpr (CAPPED) z = capped_block(Softcap<A>(a.softcap), z, n, scratch);
    Vec<A> largest[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
    for_lanes<A>(
        n, GPTK_LANES {
          largest[k] =
              max(only(load(z + i, lanes), lanes, minus_infinity), largest[k]);  // skips NaN
        });
    const A block_max = hmax(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
    if (block_max > r.max) {
      if (begin > 0) r.sum_exp *= __builtin_exp(static_cast<double>(r.max) - block_max);
      r.max = block_max;
    }
    const A base = r.max == minus_infinity[0] ? 0 : r.max;  // -inf - -inf would be NaN
    Accumulators<A> sum_exp;
    for_lanes<A>(
        n, GPTK_LANES {
          sum_exp.part[k] += exp(only(load(z + i, lanes), lanes, minus_infinity) - base);
        });
    r.sum_exp += sum_exp.total();
    if (a.label_smoothing == 0) continue;
    Accumulators<A> sum;
    for_lanes<A>(n, GPTK_LANES { sum.part[k] += load(z + i, lanes); });
    r.sum += sum.total();
  }
  return r;
}

template <typename A, bool CAPPED> void forward_row(const Forward& a, int64_t row) {
  const int64_t target = a.target[row];
  const RowSums<A> r = row_sums<A, CAPPED>(a, row);
  const double log_sum = log(r.sum_exp), lse = r.max + log_sum, s = a.label_smoothing;
  double loss = 0;
  if (target != a.ignore_index) {
    if (target < 0 || target >= a.V)
      loss = __builtin_nan("");
    else {
      A z = read_one<A>(a.logits, a.logits_dtype, row * a.logits_stride + target);
      if constexpr (CAPPED) z = Softcap<A>(a.softcap).at(broadcast(z)).value[0];
      // as lse - z - s (mean(z) - z), the two large terms first
      loss = (static_cast<double>(r.max) - z) + log_sum;
      if (s != 0) loss += s * (z - r.sum / a.V);
      if (a.z_loss != 0) loss += a.z_loss * lse * lse;
    }
  }
  static_cast<A*>(a.lse)[row] = static_cast<A>(lse);
  static_cast<A*>(a.loss)[row] = static_cast<A>(loss);
}

template <typename A, bool CAPPED> void forward_rows(const Forward& a) {
  parallel_rows(a.N, threads_for(a.N * a.V, a.threads), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) forward_row<A, CAPPED>(a, row);
  });
}

template <typename A> void forward(const Forward& a) {
  a.softcap == 0 ? forward_rows<A, false>(a) : forward_rows<A, true>(a);
}

template <typename A> void fill_row(const Backward& a, int64_t row, A value) {
  A block[BLOCK];
  for (int64_t i = 0; i < BLOCK; i++) block[i] = value;
  for (int64_t begin = 0; begin < a.V; begin += BLOCK)
    write_block(a.dlogits, a.dlogits_dtype, row * a.dlogits_stride + begin, min(a.V - begin, BLOCK),
                block);
}

// out = exp(z - lse) over one row; returns the sum of out.
template <typename A> double exp_row(const Backward& a, int64_t row, A* out) {
  const A lse = static_cast<const A*>(a.lse)[row];
  const A* z = static_cast<const A*>(a.logits) + row * a.logits_stride;
  double total = 0;
  for (int64_t begin = 0; begin < a.V; begin += BLOCK) {
    Accumulators<A> sum;
    for_lanes<A>(
        min(a.V - begin, BLOCK), GPTK_LANES {
          const Vec<A> p = exp(load(z + begin + i, lanes) - lse);
          store(out + begin + i, p, lanes);
          sum.part[k] += only(p, lanes, zero<A>());
        });
    total += sum.total();
  }
  return total;
}

// Where exp_row may keep a row, as A: in dlogits, or in the logits that they replace.
template <typename A> A* kept_row(const Backward& a, int64_t row) {
  if (a.dlogits_dtype == own_dtype<A>()) return static_cast<A*>(a.dlogits) + row * a.dlogits_stride;
  return static_cast<A*>(const_cast<void*>(a.logits)) + row * a.logits_stride;
}

// d (z_loss lse^2) / d lse. Where p is near 1 it is added to p - 1, not to 1.
template <typename A> A z_loss_slope(const Backward& a, A lse) {
  return a.z_loss == 0 ? 0 : static_cast<A>(2 * a.z_loss * lse);
}

// The sum of p over one row under a softcap.
template <typename A> double capped_total(const Backward& a, int64_t row) {
  const A lse = static_cast<const A*>(a.lse)[row];
  const A* logits = static_cast<const A*>(a.logits) + row * a.logits_stride;
  const Softcap<A> softcap(a.softcap);
  double total = 0;
  for (int64_t begin = 0; begin < a.V; begin += BLOCK) {
    Accumulators<A> sum;
    for_lanes<A>(
        min(a.V - begin, BLOCK), GPTK_LANES {
          const Vec<A> z = softcap.at(load(logits + begin + i, lanes)).value;
          sum.part[k] += only(exp(z - lse), lanes, zero<A>());
        });
    total += sum.total();
  }
  return total;
}

// backward_row under a softcap: the slope needs the logits, so p does not take their place.
template <typename A> void capped_backward_row(const Backward& a, int64_t row) {
  const A dloss = static_cast<const A*>(a.dloss)[row], lse = static_cast<const A*>(a.lse)[row];
  const A s = static_cast<A>(a.label_smoothing), uniform = s / static_cast<A>(a.V);
  const bool own = a.logits_dtype == own_dtype<A>();
  const A inverse = own ? static_cast<A>(1.0 / capped_total<A>(a, row)) : 1;
  const A z_slope = z_loss_slope(a, lse), scale = inverse * (1 + z_slope);
  const Softcap<A> softcap(a.softcap);
  A logits_scratch[BLOCK], scratch[BLOCK];
  for (int64_t begin = 0; begin < a.V; begin += BLOCK) {
    const int64_t n = min(a.V - begin, BLOCK), hit = a.target[row] - begin;
    const A* logits =
        read_block(a.logits, a.logits_dtype, row * a.logits_stride + begin, n, logits_scratch);
    const bool is_hit = hit >= 0 && hit < n;
    const A logit = is_hit ? logits[hit] : 0;  // of the target, before its gradient takes its place
    const int64_t offset = row * a.dlogits_stride + begin;
    A* d = target_block(a.dlogits, a.dlogits_dtype, offset, scratch);
    for_lanes<A>(
        n, GPTK_LANES {
          const ValueSlope<A> z = softcap.at(load(logits + i, lanes));
          store(d + i, (exp(z.value - lse) * scale - uniform) * z.slope * dloss, lanes);
        });
    if (is_hit) {
      const ValueSlope<A> z = softcap.at(broadcast(logit));
      const A p = exp(z.value - lse)[0] * inverse;
      d[hit] = (((p - uniform) - (1 - s)) + z_slope * p) * z.slope[0] * dloss;
    }
    write_block(a.dlogits, a.dlogits_dtype, offset, n, d);
  }
}

template <typename A> void backward_row(const Backward& a, int64_t row) {
  const int64_t target = a.target[row];
  if (target == a.ignore_index) return fill_row<A>(a, row, 0);
  if (target < 0 || target >= a.V) return fill_row<A>(a, row, static_cast<A>(__builtin_nan("")));
  if (a.softcap != 0) return capped_backward_row<A>(a, row);
  const A dloss = static_cast<const A*>(a.dloss)[row], lse = static_cast<const A*>(a.lse)[row];
  const A s = static_cast<A>(a.label_smoothing), uniform = s / static_cast<A>(a.V);
  const bool own = a.logits_dtype == own_dtype<A>();
  A* kept = own ? kept_row<A>(a, row) : nullptr;
  const A inverse = own ? static_cast<A>(1.0 / exp_row<A>(a, row, kept)) : 1;
  const A z_slope = z_loss_slope(a, lse), scale = inverse * (1 + z_slope);
  A p_scratch[BLOCK], scratch[BLOCK];
  for (int64_t begin = 0; begin < a.V; begin += BLOCK) {
    const int64_t n = min(a.V - begin, BLOCK), offset = row * a.dlogits_stride + begin;
    const A* p = own ? kept + begin : p_scratch;
    if (!own) {
      const A* z =
          read_block(a.logits, a.logits_dtype, row * a.logits_stride + begin, n, p_scratch);
      for_lanes<A>(n, GPTK_LANES { store(p_scratch + i, exp(load(z + i, lanes) - lse), lanes); });
    }
    const int64_t hit = target - begin;
    const A p_target = hit >= 0 && hit < n ? p[hit] * inverse : 0;
    A* d = target_block(a.dlogits, a.dlogits_dtype, offset, scratch);
    for_lanes<A>(
        n, GPTK_LANES { store(d + i, (load(p + i, lanes) * scale - uniform) * dloss, lanes); });
    if (hit >= 0 && hit < n) {
      A dz = (p_target - uniform) - (1 - s);
      if (a.z_loss != 0) dz += z_slope * p_target;
      d[hit] = dz * dloss;
    }
    write_block(a.dlogits, a.dlogits_dtype, offset, n, d);
  }
}

template <typename A> void backward(const Backward& a) {
  parallel_rows(a.N, threads_for(a.N * a.V, a.threads), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) backward_row<A>(a, row);
  });
}

}  // namespace

void cross_entropy_forward(const gptk_cross_entropy_forward_args& a) {
  GPTK_WITH_ACC(a.logits_dtype, forward, a);
}
void cross_entropy_backward(const gptk_cross_entropy_backward_args& a) {
  GPTK_WITH_ACC(a.logits_dtype, backward, a);
}

}  // namespace GPTK_ISA
}  // namespace gptk
