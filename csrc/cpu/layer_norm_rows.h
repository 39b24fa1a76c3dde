// Layer norm of rows that fit the first-level cache, in the dtypes that training has: each row is
// read from memory once, every pass knows its types. layer_norm.cpp has the formulas, and takes
// wider rows and other dtypes.
#pragma once

#include "blocks.h"
#include "dropout.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

using Forward = gptk_layer_norm_forward_args;
using Backward = gptk_layer_norm_backward_args;

template <typename A> struct Statistics {
  A mean, rstd;
};

// The two row means that the gradient needs.
//   g = dy * weight      mean_g = mean(g)      mean_gx = mean(g * xhat)
template <typename A> struct RowMeans {
  A mean_g, mean_gx;
};

constexpr int64_t KEPT = 2048;  // elements of a kept row: 8 KB of float

GPTK_INLINE VecF rounded(VecF v, float) { return v; }
template <typename Half> GPTK_INLINE VecF rounded(VecF v, Half) {
  return widen(narrow(v, Half()), Half());
}

template <typename T> constexpr int32_t dtype_of();
template <> constexpr int32_t dtype_of<float>() { return GPTK_FLOAT32; }
template <> constexpr int32_t dtype_of<bf16>() { return GPTK_BFLOAT16; }
template <> constexpr int32_t dtype_of<fp16>() { return GPTK_FLOAT16; }

// May a tensor of T stand beside rows of TH? In TH, or in 16 bits beside float.
template <typename T, typename TH> constexpr bool fits() {
  return dtype_of<T>() == dtype_of<TH>() || dtype_of<TH>() == GPTK_FLOAT32;
}

// f(T()) with the storage type of a dtype code; false for another than these.
template <typename F> bool with_storage(int32_t dtype, const F& f) {
  switch (dtype) {
  case GPTK_FLOAT32:
    return f(float());
  case GPTK_BFLOAT16:
    return f(bf16());
  case GPTK_FLOAT16:
    return f(fp16());
  }
  return false;
}

// --- forward -------------------------------------------------------------------------------

// h = residual + dropout(x) into memory and into `kept` as it was rounded; returns the sum.
template <bool DROPOUT, typename TX, typename TH>
float add_residual(const TX* x, const TH* residual, const float* keep, int64_t N, TH* h,
                   float* kept) {
  Accumulators<float> sum;
  for_lanes<float>(
      N, GPTK_LANES {
        VecF branch = load(x + i, lanes);
        if constexpr (DROPOUT) {
          const VecF s = load(keep + i, lanes);
          branch = select(s != 0, branch * s, zero<float>());  // a dropped NaN is dropped
        }
        const VecF v = rounded(load(residual + i, lanes) + branch, TH());
        store(h + i, v, lanes);
        store(kept + i, v, lanes);
        sum.part[k] += v;
      });
  return sum.total();
}

template <typename TX> float keep_row(const TX* x, int64_t N, float* kept) {
  Accumulators<float> sum;
  for_lanes<float>(
      N, GPTK_LANES {
        const VecF v = load(x + i, lanes);
        store(kept + i, v, lanes);
        sum.part[k] += v;
      });
  return sum.total();
}

GPTK_INLINE Statistics<float> statistics(const float* h, int64_t N, float total, double eps) {
  const float center = static_cast<float>(static_cast<double>(total) / N);
  Accumulators<float> first, second;
  for_lanes<float>(
      N, GPTK_LANES {
        const VecF d = only(load(h + i, lanes) - center, lanes, zero<float>());
        first.part[k] += d;
        second.part[k] = fma(d, d, second.part[k]);
      });
  const double deviation = static_cast<double>(first.total()) / N;
  const double variance = static_cast<double>(second.total()) / N - deviation * deviation;
  return {static_cast<float>(center + deviation),
          static_cast<float>(1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps))};
}

template <typename TX, typename TH, typename TY> void forward_rows(const Forward& a) {
  const uint64_t threshold = gptk_keep_threshold(a.dropout_p);
  const float scale = static_cast<float>(keep_scale(a.dropout_p));
  const int64_t N = a.N;
  parallel_rows(a.M, threads_for(a.M * N, a.threads), [&](int64_t begin, int64_t end) {
    float w_scratch[KEPT], b_scratch[KEPT], kept[KEPT], keep[KEPT];
    const float* w = a.weight ? read_block(a.weight, a.weight_dtype, 0, N, w_scratch) : nullptr;
    const float* b = a.bias ? read_block(a.bias, a.bias_dtype, 0, N, b_scratch) : nullptr;
    const VecF one = zero<float>() + 1;
    for (int64_t row = begin; row < end; row++) {
      const TX* x = static_cast<const TX*>(a.x) + row * N;
      float total;
      if (a.residual) {
        const TH* residual = static_cast<const TH*>(a.residual) + row * N;
        TH* h = static_cast<TH*>(a.h) + row * N;
        if (a.dropout_p > 0) {
          keep_scale_row(a.seed, static_cast<uint64_t>(row), 0, N, threshold, scale, keep);
          total = add_residual<true>(x, residual, keep, N, h, kept);
        } else {
          total = add_residual<false>(x, residual, keep, N, h, kept);
        }
      } else {
        total = keep_row(x, N, kept);
      }
      const Statistics<float> s = statistics(kept, N, total, a.eps);
      static_cast<float*>(a.mean)[row] = s.mean;
      static_cast<float*>(a.rstd)[row] = s.rstd;
      TY* y = static_cast<TY*>(a.y) + row * N;
      for_lanes<float>(
          N, GPTK_LANES {
            const VecF weight = w ? load(w + i, lanes) : one;
            const VecF bias = b ? load(b + i, lanes) : zero<float>();
            store(y + i, fma((load(kept + i, lanes) - s.mean) * s.rstd, weight, bias), lanes);
          });
    }
  });
}

// Done here? False: take the general way.
bool forward_typed(const Forward& a) {
  const bool one_dtype = a.residual ? a.residual_dtype == a.h_dtype : a.x_dtype == a.h_dtype;
  if (a.N > KEPT || !one_dtype) return false;
  return with_storage(a.h_dtype, [&](auto h) {
    return with_storage(a.x_dtype, [&](auto x) {
      return with_storage(a.y_dtype, [&](auto y) {
        using TX = decltype(x);
        using TH = decltype(h);
        using TY = decltype(y);
        if constexpr (fits<TX, TH>() && fits<TY, TH>()) {
          forward_rows<TX, TH, TY>(a);
          return true;
        } else {
          return false;
        }
      });
    });
  });
}

// --- backward ------------------------------------------------------------------------------

// The means of ROWS rows from `row` on, and their part of dweight and dbias: these are read and
// written once for all of them, row after row in the sum.
template <int ROWS, typename TH, typename TDY>
void row_means(const Backward& a, int64_t row, const float* w, float* dw, float* db,
               RowMeans<float>* means) {
  const int64_t N = a.N;
  const TH* h = static_cast<const TH*>(a.h) + row * N;
  const TDY* dy = static_cast<const TDY*>(a.dy) + row * N;
  const VecF one = zero<float>() + 1;
  VecF mean[ROWS], rstd[ROWS], sum_g[ROWS], sum_gx[ROWS];
  for (int r = 0; r < ROWS; r++) {
    mean[r] = broadcast(static_cast<const float*>(a.mean)[row + r]);
    rstd[r] = broadcast(static_cast<const float*>(a.rstd)[row + r]);
    sum_g[r] = sum_gx[r] = zero<float>();
  }
  for_lanes<float>(
      N, GPTK_LANES {
        const VecF weight = w ? load(w + i, lanes) : one;
        VecF dweight = dw ? load(dw + i, lanes) : zero<float>();
        VecF dbias = db ? load(db + i, lanes) : zero<float>();
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          const VecF d = load(dy + r * N + i, lanes);
          const VecF xhat = (load(h + r * N + i, lanes) - mean[r]) * rstd[r];
          const VecF g = d * weight;
          sum_g[r] += g;
          sum_gx[r] = fma(g, only(xhat, lanes, zero<float>()), sum_gx[r]);
          dweight = fma(d, xhat, dweight);
          dbias += d;
        }
        if (dw) store(dw + i, dweight, lanes);
        if (db) store(db + i, dbias, lanes);
      });
  for (int r = 0; r < ROWS; r++)
    means[r] = {static_cast<float>(static_cast<double>(hsum(sum_g[r])) / N),
                static_cast<float>(static_cast<double>(hsum(sum_gx[r])) / N)};
}

template <bool DROPOUT, typename TX, typename TH, typename TDY>
void gradient_row(const Backward& a, int64_t row, const float* w, RowMeans<float> m,
                  const float* keep) {
  const int64_t N = a.N;
  const float mean = static_cast<const float*>(a.mean)[row];
  const float rstd = static_cast<const float*>(a.rstd)[row];
  const TH* h = static_cast<const TH*>(a.h) + row * N;
  const TH* dh = a.dh ? static_cast<const TH*>(a.dh) + row * N : nullptr;
  const TDY* dy = static_cast<const TDY*>(a.dy) + row * N;
  TH* dresidual = a.dresidual ? static_cast<TH*>(a.dresidual) + row * N : nullptr;
  TX* dx = a.dx ? static_cast<TX*>(a.dx) + row * N : nullptr;
  const VecF one = zero<float>() + 1;
  for_lanes<float>(
      N, GPTK_LANES {
        const VecF xhat = (load(h + i, lanes) - mean) * rstd;
        const VecF g = load(dy + i, lanes) * (w ? load(w + i, lanes) : one);
        VecF grad = (g - m.mean_g - xhat * m.mean_gx) * rstd;
        if (dh) grad += load(dh + i, lanes);
        if (dresidual) store(dresidual + i, grad, lanes);
        if constexpr (DROPOUT) {
          const VecF s = load(keep + i, lanes);
          grad = select(s != 0, grad * s, zero<float>());
        }
        if (dx) store(dx + i, grad, lanes);
      });
}

template <typename TX, typename TH, typename TDY> void backward_rows(const Backward& a) {
  constexpr int ROWS = 4;
  const uint64_t threshold = gptk_keep_threshold(a.dropout_p);
  const float scale = static_cast<float>(keep_scale(a.dropout_p));
  float* dweight_partial = static_cast<float*>(a.partial);  // (groups, N), then dbias's
  parallel_for(a.groups, threads_for(a.M * a.N, a.threads), [&](int64_t group) {
    float w_scratch[KEPT], keep[KEPT];
    const float* w = a.weight ? read_block(a.weight, a.weight_dtype, 0, a.N, w_scratch) : nullptr;
    float* dw = a.dweight ? dweight_partial + group * a.N : nullptr;
    float* db = a.dbias ? dweight_partial + (a.groups + group) * a.N : nullptr;
    for (int64_t j = 0; dw && j < a.N; j++) dw[j] = 0;
    for (int64_t j = 0; db && j < a.N; j++) db[j] = 0;
    const int64_t end = group_begin(a.M, a.groups, group + 1);
    for (int64_t row = group_begin(a.M, a.groups, group); row < end;) {
      RowMeans<float> means[ROWS];
      const int step = end - row >= ROWS ? ROWS : 1;
      if (step == ROWS)
        row_means<ROWS, TH, TDY>(a, row, w, dw, db, means);
      else
        row_means<1, TH, TDY>(a, row, w, dw, db, means);
      for (int r = 0; r < step && (a.dx || a.dresidual); r++) {
        if (a.dropout_p > 0 && a.dx) {
          keep_scale_row(a.seed, static_cast<uint64_t>(row + r), 0, a.N, threshold, scale, keep);
          gradient_row<true, TX, TH, TDY>(a, row + r, w, means[r], keep);
        } else {
          gradient_row<false, TX, TH, TDY>(a, row + r, w, means[r], keep);
        }
      }
      row += step;
    }
  });
}

// Done here, up to the sums over groups? False: take the general way.
bool backward_typed(const Backward& a) {
  if (a.N > KEPT || (a.dresidual && a.residual_dtype != a.h_dtype)) return false;
  return with_storage(a.h_dtype, [&](auto h) {
    return with_storage(a.dx ? a.x_dtype : a.h_dtype, [&](auto x) {
      return with_storage(a.dy_dtype, [&](auto dy) {
        using TX = decltype(x);
        using TH = decltype(h);
        using TDY = decltype(dy);
        if constexpr (fits<TX, TH>() && fits<TDY, TH>()) {
          backward_rows<TX, TH, TDY>(a);
          return true;
        } else {
          return false;
        }
      });
    });
  });
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
