// Layer norm over the last dimension, with the residual addition and dropout of a pre-norm block
// fused in.
//
//   h = residual + dropout(x)      y = (h - mean) * rstd * weight + bias
//   x, residual, h, y (M, N)       weight, bias (N,)       mean, rstd (M,)
//
// Threads: rows; the backward splits them into `groups`, a function of M. dweight and dbias are
// summed group by group into `partial` and then over groups in order, so no result depends on the
// number of threads.
// Statistics: mean first, then the variance about it, then both corrected by the mean of the
// deviations (that is zero in exact arithmetic); block sums are added in double. A mean far from 0
// costs no digits of the variance.
#include "layer_norm_rows.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

template <typename A>
Statistics<A> statistics(const void* h, int32_t dtype, int64_t offset, int64_t N, double eps) {
  A scratch[BLOCK];
  double total = 0;
  for (int64_t begin = 0; begin < N; begin += BLOCK) {
    const int64_t n = min(N - begin, BLOCK);
    const A* v = read_block(h, dtype, offset + begin, n, scratch);
    Accumulators<A> sum;
    for_lanes<A>(n, GPTK_LANES { sum.part[k] += load(v + i, lanes); });
    total += sum.total();
  }
  const A center = static_cast<A>(total / N);
  double deviation = 0, squared = 0;
  for (int64_t begin = 0; begin < N; begin += BLOCK) {
    const int64_t n = min(N - begin, BLOCK);
    const A* v = read_block(h, dtype, offset + begin, n, scratch);
    Accumulators<A> first, second;
    for_lanes<A>(
        n, GPTK_LANES {
          const Vec<A> d = only(load(v + i, lanes) - center, lanes, zero<A>());
          first.part[k] += d;
          second.part[k] = fma(d, d, second.part[k]);
        });
    deviation += first.total();
    squared += second.total();
  }
  deviation /= N;
  const double variance = squared / N - deviation * deviation;
  return {static_cast<A>(center + deviation),
          static_cast<A>(1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps))};
}

// h = residual + dropout(x), one row.
template <typename A> void add_residual_row(const Forward& a, int64_t row, uint64_t threshold) {
  A x_scratch[BLOCK], residual_scratch[BLOCK], h_scratch[BLOCK], keep[BLOCK];
  const A scale = static_cast<A>(keep_scale(a.dropout_p));
  for (int64_t begin = 0; begin < a.N; begin += BLOCK) {
    const int64_t n = min(a.N - begin, BLOCK), offset = row * a.N + begin;
    const A* x = read_block(a.x, a.x_dtype, offset, n, x_scratch);
    const A* residual = read_block(a.residual, a.residual_dtype, offset, n, residual_scratch);
    A* h = target_block(a.h, a.h_dtype, offset, h_scratch);
    if (a.dropout_p > 0) {
      keep_scale_row(a.seed, static_cast<uint64_t>(row), begin, n, threshold, scale, keep);
      for_lanes<A>(
          n, GPTK_LANES {
            const Vec<A> s = load(keep + i, lanes);
            const Vec<A> kept =
                select(s != 0, load(x + i, lanes) * s, zero<A>());  // a dropped NaN is dropped
            store(h + i, load(residual + i, lanes) + kept, lanes);
          });
    } else {
      for_lanes<A>(
          n, GPTK_LANES { store(h + i, load(residual + i, lanes) + load(x + i, lanes), lanes); });
    }
    write_block(a.h, a.h_dtype, offset, n, h);
  }
}

// y = (h - mean) * rstd * weight + bias, one row.
template <typename A>
void normalise_row(const Forward& a, const void* rows, int64_t row, Statistics<A> s) {
  A h_scratch[BLOCK], w_scratch[BLOCK], b_scratch[BLOCK], y_scratch[BLOCK];
  const Vec<A> one = zero<A>() + 1;
  for (int64_t begin = 0; begin < a.N; begin += BLOCK) {
    const int64_t n = min(a.N - begin, BLOCK), offset = row * a.N + begin;
    const A* h = read_block(rows, a.h_dtype, offset, n, h_scratch);
    const A* w = a.weight ? read_block(a.weight, a.weight_dtype, begin, n, w_scratch) : nullptr;
    const A* b = a.bias ? read_block(a.bias, a.bias_dtype, begin, n, b_scratch) : nullptr;
    A* y = target_block(a.y, a.y_dtype, offset, y_scratch);
    for_lanes<A>(
        n, GPTK_LANES {
          const Vec<A> weight = w ? load(w + i, lanes) : one;
          const Vec<A> bias = b ? load(b + i, lanes) : zero<A>();
          store(y + i, fma((load(h + i, lanes) - s.mean) * s.rstd, weight, bias), lanes);
        });
    write_block(a.y, a.y_dtype, offset, n, y);
  }
}

template <typename A> void forward(const Forward& a) {
  const uint64_t threshold = gptk_keep_threshold(a.dropout_p);
  const void* h = a.residual ? a.h : a.x;
  parallel_rows(a.M, threads_for(a.M * a.N, a.threads), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      if (a.residual) add_residual_row<A>(a, row, threshold);
      const Statistics<A> s = statistics<A>(h, a.h_dtype, row * a.N, a.N, a.eps);
      static_cast<A*>(a.mean)[row] = s.mean;
      static_cast<A*>(a.rstd)[row] = s.rstd;
      normalise_row<A>(a, h, row, s);
    }
  });
}

// A row's means, and its part of dweight and dbias.
template <typename A>
RowMeans<A> backward_sums(const Backward& a, int64_t row, Statistics<A> s, A* dweight, A* dbias) {
  A dy_scratch[BLOCK], h_scratch[BLOCK], w_scratch[BLOCK];
  const Vec<A> one = zero<A>() + 1;
  double total_g = 0, total_gx = 0;
  for (int64_t begin = 0; begin < a.N; begin += BLOCK) {
    const int64_t n = min(a.N - begin, BLOCK), offset = row * a.N + begin;
    const A* dy = read_block(a.dy, a.dy_dtype, offset, n, dy_scratch);
    const A* h = read_block(a.h, a.h_dtype, offset, n, h_scratch);
    const A* w = a.weight ? read_block(a.weight, a.weight_dtype, begin, n, w_scratch) : nullptr;
    A* dw = dweight ? dweight + begin : nullptr;
    A* db = dbias ? dbias + begin : nullptr;
    Accumulators<A> sum_g, sum_gx;
    for_lanes<A>(
        n, GPTK_LANES {
          const Vec<A> d = load(dy + i, lanes);
          const Vec<A> xhat = only((load(h + i, lanes) - s.mean) * s.rstd, lanes, zero<A>());
          const Vec<A> g = d * (w ? load(w + i, lanes) : one);
          sum_g.part[k] += g;
          sum_gx.part[k] = fma(g, xhat, sum_gx.part[k]);
          if (dw) store(dw + i, fma(d, xhat, load(dw + i, lanes)), lanes);
          if (db) store(db + i, d + load(db + i, lanes), lanes);
        });
    total_g += sum_g.total();
    total_gx += sum_gx.total();
  }
  return {static_cast<A>(total_g / a.N), static_cast<A>(total_gx / a.N)};
}

// dresidual = rstd * (g - mean_g - xhat * mean_gx) + dh,  dx = dropout mask * dresidual, one row.
template <typename A>
void backward_row(const Backward& a, int64_t row, Statistics<A> s, RowMeans<A> m,
                  uint64_t threshold) {
  A dy_scratch[BLOCK], h_scratch[BLOCK], w_scratch[BLOCK], dh_scratch[BLOCK], d[BLOCK], keep[BLOCK];
  const Vec<A> one = zero<A>() + 1;
  const A scale = static_cast<A>(keep_scale(a.dropout_p));
  for (int64_t begin = 0; begin < a.N; begin += BLOCK) {
    const int64_t n = min(a.N - begin, BLOCK), offset = row * a.N + begin;
    const A* dy = read_block(a.dy, a.dy_dtype, offset, n, dy_scratch);
    const A* h = read_block(a.h, a.h_dtype, offset, n, h_scratch);
    const A* w = a.weight ? read_block(a.weight, a.weight_dtype, begin, n, w_scratch) : nullptr;
    const A* dh = a.dh ? read_block(a.dh, a.h_dtype, offset, n, dh_scratch) : nullptr;
    for_lanes<A>(
        n, GPTK_LANES {
          const Vec<A> xhat = (load(h + i, lanes) - s.mean) * s.rstd;
          const Vec<A> g = load(dy + i, lanes) * (w ? load(w + i, lanes) : one);
          Vec<A> grad = (g - m.mean_g - xhat * m.mean_gx) * s.rstd;
          if (dh) grad += load(dh + i, lanes);
          store(d + i, grad, lanes);
        });
    if (a.dresidual) write_block(a.dresidual, a.residual_dtype, offset, n, d);
    if (!a.dx) continue;
    if (a.dropout_p > 0) {
      keep_scale_row(a.seed, static_cast<uint64_t>(row), begin, n, threshold, scale, keep);
      for_lanes<A>(
          n, GPTK_LANES {
            const Vec<A> k_scale = load(keep + i, lanes);
            store(d + i, select(k_scale != 0, load(d + i, lanes) * k_scale, zero<A>()), lanes);
          });
    }
    write_block(a.dx, a.x_dtype, offset, n, d);
  }
}

template <typename A> void backward_groups(const Backward& a) {
  const uint64_t threshold = gptk_keep_threshold(a.dropout_p);
  A* dweight_partial = static_cast<A*>(a.partial);      // (groups, N)
  A* dbias_partial = dweight_partial + a.groups * a.N;  // (groups, N)
  parallel_for(a.groups, threads_for(a.M * a.N, a.threads), [&](int64_t group) {
    A* dw = a.dweight ? dweight_partial + group * a.N : nullptr;
    A* db = a.dbias ? dbias_partial + group * a.N : nullptr;
    for (int64_t j = 0; dw && j < a.N; j++) dw[j] = 0;
    for (int64_t j = 0; db && j < a.N; j++) db[j] = 0;
    const int64_t end = group_begin(a.M, a.groups, group + 1);
    for (int64_t row = group_begin(a.M, a.groups, group); row < end; row++) {
      const Statistics<A> s = {static_cast<const A*>(a.mean)[row],
                               static_cast<const A*>(a.rstd)[row]};
      const RowMeans<A> m = backward_sums<A>(a, row, s, dw, db);
      if (a.dx || a.dresidual) backward_row<A>(a, row, s, m, threshold);
    }
  });
}

template <typename A> void sum_partial(const Backward& a) {
  const A* dweight_partial = static_cast<const A*>(a.partial);
  const A* dbias_partial = dweight_partial + a.groups * a.N;
  if (a.dweight)
    sum_groups<A>(a.dweight, a.weight_dtype, dweight_partial, a.groups, a.N, a.threads);
  if (a.dbias) sum_groups<A>(a.dbias, a.weight_dtype, dbias_partial, a.groups, a.N, a.threads);
}

}  // namespace

void layer_norm_forward(const gptk_layer_norm_forward_args& a) {
  if (!forward_typed(a)) GPTK_WITH_ACC(a.h_dtype, forward, a);
}
void layer_norm_backward(const gptk_layer_norm_backward_args& a) {
  if (!backward_typed(a)) GPTK_WITH_ACC(a.h_dtype, backward_groups, a);
  GPTK_WITH_ACC(a.h_dtype, sum_partial, a);
}

}  // namespace GPTK_ISA
}  // namespace gptk
