// The matrix product and its epilogue: c = activation(a b + bias), or c = (a b) * slope.
//
//   for columns of b in blocks                            (gemm_plan.h)
//     for k in passes of at most 4096
//       pack the block of b in panels of two vectors      every thread
//       for stripes of rows of a, one thread each:
//         pack the stripe                                 stays in the second-level cache
//         for panels of b: for rows of the stripe: gemm_kernel, a chunk of k at a time
//
// Goto, van de Geijn, "Anatomy of high-performance matrix multiplication" (2008); the order of the
// two inner loops and the shared packed b as in BLIS. A kernel's sums go to a tile on the stack,
// and from there through the epilogue to c while they are in the first-level cache.
//
// Threads: panels when packing, then stripes. Each element of c is summed pass by pass, in order,
// and passes depend on K alone: no result depends on the number of threads.
#include "activation.h"
#include "blocks.h"
#include "gemm_narrow.h"
#include "gemm_plan.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

using Args = gptk_gemm_args;
using namespace gemm_plan;

struct Pass {
  int64_t n, columns, k, depth;
  bool first, last;
};

// From sums in a tile (rows, PANEL) to c: n columns from column j of row i on.
template <typename A>
using Finish = void (*)(const Args& a, int64_t i, int rows, int64_t j, int64_t n, const A* bias,
                        const A* tile, int64_t tile_m);

template <typename A, typename T, typename Activation, bool SLOPE>
void finish_tile(const Args& a, int64_t i, int rows, int64_t j, int64_t n, const A* bias,
                 const A* tile, int64_t tile_m) {
  int64_t offset = i * a.N + j;
  for (int row = 0; row < rows; row++, offset += a.N, tile += tile_m) {
    T* c = static_cast<T*>(a.c) + offset;
    T* other = SLOPE ? static_cast<T*>(a.value) : static_cast<T*>(a.pre);
    if (other) other += offset;
    for_lanes<A>(
        n, GPTK_LANES {
          Vec<A> x = load(tile + i, lanes);
          if constexpr (SLOPE) {
            const T* slope_of = static_cast<const T*>(a.slope_of) + offset;
            const ValueSlope<A> f = Activation::template at<A>(load(slope_of + i, lanes));
            store(c + i, x * f.slope, lanes);
            if (other) store(other + i, f.value, lanes);
          } else {
            if (bias) x += load(bias + i, lanes);
            if (other) store(other + i, x, lanes);
            store(c + i, Activation::template at<A>(x).value, lanes);
          }
        });
  }
}

template <typename A, typename T, typename Activation> Finish<A> finish_for(const Args& a) {
  return a.slope_of ? finish_tile<A, T, Activation, true> : finish_tile<A, T, Activation, false>;
}
template <typename A, typename T> Finish<A> finish_for(const Args& a) {
  if (a.activation == GPTK_GELU) return finish_for<A, T, GeluErf>(a);
  if (a.activation == GPTK_GELU_TANH) return finish_for<A, T, GeluTanh>(a);
  return finish_for<A, T, Identity>(a);
}
template <typename A> Finish<A> finish_for(const Args& a) {
  if constexpr (sizeof(A) == sizeof(double)) {
    return finish_for<A, double>(a);
  } else {
    if (a.c_dtype == GPTK_BFLOAT16) return finish_for<A, bf16>(a);
    if (a.c_dtype == GPTK_FLOAT16) return finish_for<A, fp16>(a);
    return finish_for<A, float>(a);
  }
}

// row (n,) += before (n,)
template <typename A> GPTK_INLINE void add_row(A* row, const A* before, int64_t n) {
  for_lanes<A>(
      n, GPTK_LANES { store(row + i, load(row + i, lanes) + load(before + i, lanes), lanes); });
}

// One panel of b, all rows of a stripe. sums: where passes before the last are kept, or null.
// packed_a: row by row, lda apart, or (Adjacent::rows) in panels of KERNEL_ROWS rows side by side.
template <typename E, Adjacent SIDE, typename LD, typename A = typename ElementOf<E>::acc>
void panel(const Args& a, const Pass& pass, int64_t n, Range rows, const E* packed_a, LD lda,
           const E* packed_b, A* sums, int64_t sums_m, Finish<A> finish) {
  constexpr int W = Lanes<A>::value, PANEL = 2 * W;
  const int64_t width = smaller(PANEL, pass.columns - n),
                K = ceil_div(pass.depth, ElementOf<E>::DEPTH);
  A bias_scratch[PANEL], tile[KERNEL_ROWS * PANEL];
  const A* bias = a.bias && pass.last
                      ? read_block(a.bias, a.bias_dtype, pass.n + n, width, bias_scratch)
                      : nullptr;
  const bool plain = a.c_dtype == own_dtype<A>() && !a.bias && !a.slope_of &&
                     a.activation == GPTK_IDENTITY && !a.pre && width == PANEL;
  for (int64_t m = rows.begin; m < rows.end; m += KERNEL_ROWS) {
    const int step = static_cast<int>(smaller(KERNEL_ROWS, rows.end - m));
    const int64_t at = m - rows.begin;
    const E* a_step = packed_a + at * (SIDE == Adjacent::columns ? static_cast<int64_t>(lda) : K);
    A* out = tile;
    int64_t out_m = PANEL;
    bool add = false;
    if (!pass.last) {
      out = sums + m * sums_m + n, out_m = sums_m, add = !pass.first;
    } else if (plain) {
      out = static_cast<A*>(a.c) + m * a.N + pass.n + n, out_m = a.N, add = a.add != 0;
    }
    for (int64_t k = 0; k == 0 || k < K; k += CHUNK) {
      const E* a_chunk = a_step + k * (SIDE == Adjacent::columns ? 1 : KERNEL_ROWS);
      const E* b_chunk = packed_b + k * PANEL;
      const Sum<A> end = {add || k > 0};
      const int64_t depth = smaller(CHUNK, K - k);
      if (width > W)
        gemm_rows<E, 2, SIDE>(step, depth, a_chunk, lda, b_chunk, out, out_m, end);
      else
        gemm_rows<E, 1, SIDE>(step, depth, a_chunk, lda, b_chunk, out, out_m, end);
    }
    if (!pass.last) continue;
    for (int i = 0; i < step; i++) {
      if (!pass.first) add_row(out + i * out_m, sums + (m + i) * sums_m + n, width);
      if (a.add && !plain)
        add_row(out + i * out_m, static_cast<const A*>(a.c) + (m + i) * a.N + pass.n + n, width);
    }
    if (!plain) finish(a, m, step, pass.n + n, width, bias, out, out_m);
  }
}

// --- few rows ------------------------------------------------------------------------------

template <int M, typename E, typename TA, typename TB, typename A = typename ElementOf<E>::acc>
void narrow_product(const Args& a) {
  constexpr int64_t COLUMNS = 2 * Lanes<A>::value;
  auto* rows = static_cast<typename NarrowRow<E>::Kept*>(a.scratch);
  for (int m = 0; m < M; m++)
    NarrowRow<E>::pack(static_cast<const TA*>(a.a) + m * a.a_m, a.K,
                       rows + m * NarrowRow<E>::row_elements(a.K));
  const int threads = a.N * a.K < (1 << 16) ? 1 : a.threads;
  const Finish<A> finish = finish_for<A>(a);
  parallel_rows(ceil_div(a.N, COLUMNS), threads, [&](int64_t first, int64_t last) {
    for (int64_t n = first * COLUMNS; n < smaller(last * COLUMNS, a.N); n += COLUMNS) {
      const int64_t width = smaller(COLUMNS, a.N - n);
      A tile[M * COLUMNS], bias_scratch[COLUMNS];
      const TB* b = static_cast<const TB*>(a.b) + n * a.b_n;
      for (int64_t c = 0; c < width; c++)
        dot_products<M, E>(rows, a.K, b + c * a.b_n, tile + c, COLUMNS);
      const A* bias = a.bias ? read_block(a.bias, a.bias_dtype, n, width, bias_scratch) : nullptr;
      for (int m = 0; m < M && a.add; m++)
        add_row(tile + m * COLUMNS, static_cast<const A*>(a.c) + m * a.N + n, width);
      finish(a, 0, M, n, width, bias, tile, COLUMNS);
    }
  });
}

template <typename E, typename TA, typename TB> void narrow_product(const Args& a) {
  switch (a.M) {
  case 1:
    return narrow_product<1, E, TA, TB>(a);
  case 2:
    return narrow_product<2, E, TA, TB>(a);
  case 3:
    return narrow_product<3, E, TA, TB>(a);
  default:
    return narrow_product<4, E, TA, TB>(a);
  }
}

// --- the product ---------------------------------------------------------------------------

template <typename E, typename TA, typename TB, typename A = typename ElementOf<E>::acc>
void product(const Args& a) {
  constexpr int PANEL = 2 * Lanes<A>::value;
  if (a.M == 0 || a.N == 0) return;
  if (a.M <= NARROW && a.a_k == 1 && a.b_k == 1) return narrow_product<E, TA, TB>(a);
  const TA* source_a = static_cast<const TA*>(a.a);
  const TB* source_b = static_cast<const TB*>(a.b);
  const int threads = a.M * a.N * a.K < (1 << 16) ? 1 : a.threads;
  const int64_t block = columns(a.N, a.K), deep = depth(a.K),
                tall = stripe_rows(a.M, a.K, a.threads);
  const Finish<A> finish = finish_for<A>(a);
  A* sums = static_cast<A*>(a.scratch);
  E* packed_b = reinterpret_cast<E*>(sums + gemm_plan::sums(a.M, a.N, a.K));
  E* packed_a =
      reinterpret_cast<E*>(reinterpret_cast<A*>(packed_b) + gemm_plan::packed_b(a.N, a.K));
  for (int64_t n = 0; n < a.N; n += block) {
    const int64_t wide = smaller(block, a.N - n);
    for (int64_t k = 0; k == 0 || k < a.K; k += larger(deep, 1)) {
      const Pass pass = {n, wide, k, smaller(deep, a.K - k), k == 0, k + deep >= a.K};
      const int64_t K = ceil_div(pass.depth, ElementOf<E>::DEPTH), lda = K + PADDING;
      parallel_chunks(ceil_div(wide, PANEL), wide < 64 * PANEL ? 1 : 4, threads,
                      [&](int64_t, int64_t begin, int64_t end) {
                        for (int64_t p = begin; p < end; p++)
                          pack_b_panel(source_b + k * a.b_k + (n + p * PANEL) * a.b_n, a.b_k, a.b_n,
                                       pass.depth, smaller(PANEL, wide - p * PANEL),
                                       packed_b + p * PANEL * K);
                      });
      parallel_for_threads(ceil_div(a.M, tall), threads, [&](int64_t stripe, int thread) {
        const Range rows = {stripe * tall, smaller(stripe * tall + tall, a.M)};
        E* own = reinterpret_cast<E*>(reinterpret_cast<A*>(packed_a) +
                                      thread * gemm_plan::packed_a(a.M, a.K, a.threads));
        const TA* from = source_a + rows.begin * a.a_m + k * a.a_k;
        const int64_t height = rows.end - rows.begin;
        if (a.a_k == 1) {
          pack_a_rows(from, a.a_m, height, pass.depth, lda, own);
          for (int64_t p = 0; p * PANEL < wide; p++)
            panel<E, Adjacent::columns>(a, pass, p * PANEL, rows, own, lda,
                                        packed_b + p * PANEL * K, sums, block, finish);
        } else {
          const std::integral_constant<int64_t, KERNEL_ROWS> side;
          pack_columns(from, a.a_k, height, pass.depth, own);
          for (int64_t p = 0; p * PANEL < wide; p++)
            panel<E, Adjacent::rows>(a, pass, p * PANEL, rows, own, side, packed_b + p * PANEL * K,
                                     sums, block, finish);
        }
      });
    }
  }
}

template <typename E, typename TA, typename Half> void product_of_16_bits(const Args& a) {
  if (a.b_dtype == GPTK_FLOAT32)
    product<E, TA, Rounded<Half>>(a);
  else
    product<E, TA, Half>(a);
}

template <typename E, typename Half> void product_of_16_bits(const Args& a) {
  if (a.a_dtype == GPTK_FLOAT32)
    product_of_16_bits<E, Rounded<Half>, Half>(a);
  else
    product_of_16_bits<E, Half, Half>(a);
}

template <typename TA> void product_of_floats(const Args& a) {
  if (a.b_dtype == GPTK_FLOAT32)
    product<float, TA, float>(a);
  else if (a.b_dtype == GPTK_BFLOAT16)
    product<float, TA, bf16>(a);
  else
    product<float, TA, fp16>(a);
}

}  // namespace

void gemm(const gptk_gemm_args& a) {
  if (a.compute == GPTK_FLOAT64) return product<double, double, double>(a);
  if (a.compute == GPTK_FLOAT16) return product_of_16_bits<float, fp16>(a);
#if defined(__AVX512BF16__)
  if (a.compute == GPTK_BFLOAT16) return product_of_16_bits<Pair, bf16>(a);
#else
  if (a.compute == GPTK_BFLOAT16) return product_of_16_bits<float, bf16>(a);
#endif
  if (a.a_dtype == GPTK_FLOAT32) return product_of_floats<float>(a);
  if (a.a_dtype == GPTK_BFLOAT16) return product_of_floats<bf16>(a);
  return product_of_floats<fp16>(a);
}

}  // namespace GPTK_ISA
}  // namespace gptk
