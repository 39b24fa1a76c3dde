// The register kernel of every matrix product, C = [C +] scale A B, and small products on tiles
// that stay in cache: the inner loops of attention.
//
// A is read one element at a time and broadcast, B and C by vectors. A's elements may be adjacent
// along its rows or along its columns, so no product needs a transposed copy of A. B is packed in
// panels of PANEL = 2 vectors: element (k, n) of a B with K rows lies at
//
//   b[(n / PANEL) * K * PANEL + k * PANEL + n % PANEL]
//
// which the kernel reads straight through. A kernel call keeps up to KERNEL_ROWS x PANEL sums in
// registers, over at most DEPTH k: longer sums are added from such parts, which more than halves
// the error of one long chain. C has its columns padded to PANEL; what falls into the padding is
// never used.
#pragma once

#include "vec.h"

#include <utility>

namespace gptk {
namespace GPTK_ISA {
namespace {

// Sums, a row of B and one broadcast element fit the registers: 32 of AVX-512, aarch64; else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int KERNEL_ROWS = 8;
#elif defined(__AVX2__)
constexpr int KERNEL_ROWS = 6;
#else
constexpr int KERNEL_ROWS = 4;
#endif

constexpr int64_t DEPTH = 32;

template <typename A> struct Panel {
  static constexpr int value = 2 * Lanes<A>::value;
};

GPTK_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
GPTK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GPTK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Range {
  int64_t begin, end;
};

enum class Adjacent { columns, rows };  // which elements of A lie side by side

// --- elements ------------------------------------------------------------------------------
// What A and B are made of: floats, doubles, or (AVX-512 BF16) pairs of bf16 that are neighbours
// along k: vdpbf16ps multiplies both and adds the two products to a float sum.

struct Pair {
  uint32_t bits;  // lower half: even k
};

template <typename E> struct ElementOf {
  typedef E acc;
  typedef Vec<E> vector;
  static constexpr int DEPTH = 1;
  static GPTK_INLINE vector row(const E* p) { return load(p); }
  static GPTK_INLINE vector all(E x) { return broadcast(x); }
  static GPTK_INLINE Vec<E> multiply_add(vector a, vector b, Vec<E> sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
template <> struct ElementOf<Pair> {
  typedef float acc;
  typedef __m512i vector;
  static constexpr int DEPTH = 2;
  static GPTK_INLINE vector row(const Pair* p) { return _mm512_loadu_si512(p); }
  static GPTK_INLINE vector all(Pair x) { return _mm512_set1_epi32(static_cast<int>(x.bits)); }
  static GPTK_INLINE VecF multiply_add(vector a, vector b, VecF sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// --- product -------------------------------------------------------------------------------

// What becomes of a vector of sums, given where it goes: scaled, and added to what C holds there.
template <typename A> struct Epilogue {
  A scale;
  bool add;
  GPTK_INLINE Vec<A> operator()(Vec<A> sum, const A* c) const {
    return add ? fma(sum, broadcast(scale), load(c)) : sum * broadcast(scale);
  }
};
template <typename A> struct Sum {
  bool add;
  GPTK_INLINE Vec<A> operator()(Vec<A> sum, const A* c) const { return add ? load(c) + sum : sum; }
};

// c (M, NV vectors) = end(sum_k a(m, k) b(k, :)). lda: distance of A's rows (or columns); a
// constant (a type) leaves the compiler one address to keep.
template <typename E, int M, int NV, Adjacent SIDE, typename LD, typename End, typename A>
void gemm_kernel(int64_t K, const E* a, LD lda, const E* b, A* c, int64_t ldc, End end) {
  using Element = ElementOf<E>;
  constexpr int W = Lanes<A>::value;
  Vec<A> sum[M][NV];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) sum[m][v] = zero<A>();
  for (int64_t k = 0; k < K; k++) {
    typename Element::vector row[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) row[v] = Element::row(b + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const typename Element::vector x = Element::all(SIDE == Adjacent::rows ? a[m] : a[m * lda]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) sum[m][v] = Element::multiply_add(x, row[v], sum[m][v]);
    }
    a += SIDE == Adjacent::rows ? static_cast<int64_t>(lda) : 1;
    b += Panel<A>::value;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) {
      A* out = c + m * ldc + v * W;
      store(out, end(sum[m][v], out));
    }
  }
}

template <typename E, int NV, Adjacent SIDE, typename LD, typename End, typename A>
void gemm_rows(int rows, int64_t K, const E* a, LD lda, const E* b, A* c, int64_t ldc, End end) {
  switch (rows) {
#if defined(__AVX512F__) || defined(__aarch64__)
  case 8:
    return gemm_kernel<E, 8, NV, SIDE>(K, a, lda, b, c, ldc, end);
  case 7:
    return gemm_kernel<E, 7, NV, SIDE>(K, a, lda, b, c, ldc, end);
#endif
#if defined(__AVX512F__) || defined(__aarch64__) || defined(__AVX2__)
  case 6:
    return gemm_kernel<E, 6, NV, SIDE>(K, a, lda, b, c, ldc, end);
  case 5:
    return gemm_kernel<E, 5, NV, SIDE>(K, a, lda, b, c, ldc, end);
#endif
  case 4:
    return gemm_kernel<E, 4, NV, SIDE>(K, a, lda, b, c, ldc, end);
  case 3:
    return gemm_kernel<E, 3, NV, SIDE>(K, a, lda, b, c, ldc, end);
  case 2:
    return gemm_kernel<E, 2, NV, SIDE>(K, a, lda, b, c, ldc, end);
  case 1:
    return gemm_kernel<E, 1, NV, SIDE>(K, a, lda, b, c, ldc, end);
  }
}

// C (rows.., N) = [C +] scale A B over a block of rows, in steps of at most max_rows.
// k_range(first, last) gives the k that any row of a step needs: it lets triangles be skipped, and
// with max_rows = 1 no row meets a k outside its own range.
template <typename E, Adjacent SIDE, typename KRange, typename A = typename ElementOf<E>::acc>
void gemm(Range rows, int64_t N, const E* a, int64_t lda, const E* b, int64_t b_rows, A* c,
          int64_t ldc, Epilogue<A> end, int max_rows, const KRange& k_range) {
  constexpr int W = Lanes<A>::value, PANEL = Panel<A>::value;
  for (int64_t n = 0; n < N; n += PANEL, b += b_rows * PANEL) {
    for (int64_t m = rows.begin; m < rows.end; m += max_rows) {
      const int step = static_cast<int>(smaller(max_rows, rows.end - m));
      const Range range = k_range(m, m + step - 1);
      Epilogue<A> part = end;
      // parts end at multiples of DEPTH, so skipping leading zeros leaves the sum's bits alone
      for (int64_t k = range.begin, depth; k < range.end; k += depth, part.add = true) {
        depth = smaller(DEPTH - k % DEPTH, range.end - k);
        const E* a_step = SIDE == Adjacent::rows ? a + m + k * lda : a + m * lda + k;
        A* c_step = c + m * ldc + n;
        if (N - n > W)
          gemm_rows<E, 2, SIDE>(step, depth, a_step, lda, b + k * PANEL, c_step, ldc, part);
        else
          gemm_rows<E, 1, SIDE>(step, depth, a_step, lda, b + k * PANEL, c_step, ldc, part);
      }
    }
  }
}

// --- packing -------------------------------------------------------------------------------
// A source is rows of T, row_stride apart, columns adjacent.

// Finite data can be multiplied by a zero weight; NaN and infinity cannot.
template <typename A> struct FiniteCheck {
  Vec<A> poison = zero<A>();
  GPTK_INLINE void see(Vec<A> x) { poison = fma(x, zero<A>(), poison); }
  GPTK_INLINE bool finite() const {
    const A sum = hsum(poison);
    return sum == sum;
  }
};

// dst[r * cols + c], for A operands. Returns whether every value is finite.
template <typename T, typename A>
bool pack_rows(const T* src, int64_t row_stride, int64_t rows, int64_t cols, A* dst) {
  constexpr int W = Lanes<A>::value;
  FiniteCheck<A> check;
  for (int64_t r = 0; r < rows; r++, src += row_stride, dst += cols) {
    int64_t c = 0;
    for (; c + W <= cols; c += W) {
      const Vec<A> x = load(src + c);
      check.see(x);
      store(dst + c, x);
    }
    if (c < cols) {
      const Vec<A> x = load(src + c, static_cast<int>(cols - c));
      check.see(x);
      store(dst + c, x, static_cast<int>(cols - c));
    }
  }
  return check.finite();
}

// Panels of a B operand with K = rows, N = cols; padding columns are 0. Returns whether finite.
template <typename T, typename A>
bool pack_panels(const T* src, int64_t row_stride, int64_t rows, int64_t cols, A* dst) {
  constexpr int W = Lanes<A>::value, PANEL = Panel<A>::value;
  FiniteCheck<A> check;
  for (int64_t n = 0; n < cols; n += PANEL) {
    for (int64_t r = 0; r < rows; r++, dst += PANEL) {
      const T* row = src + r * row_stride + n;
      for (int v = 0; v < 2; v++) {
        const int64_t left = cols - n - v * W;
        const Vec<A> x = left >= W  ? load(row + v * W)
                         : left > 0 ? load(row + v * W, static_cast<int>(left))
                                    : zero<A>();
        check.see(x);
        store(dst + v * W, x);
      }
    }
  }
  return check.finite();
}

template <bool SECOND, int SPAN, int... I, typename V>
GPTK_INLINE V exchange(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int W = sizeof...(I);
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b, (SECOND ? ((I & SPAN) ? W + I : I + SPAN) : ((I & SPAN) ? W + I - SPAN : I))...);
#else
  typedef decltype(a > b) Index;
  return __builtin_shuffle(
      a, b, Index{(SECOND ? ((I & SPAN) ? W + I : I + SPAN) : ((I & SPAN) ? W + I - SPAN : I))...});
#endif
}

// Exchanges the off-diagonal SPAN x SPAN blocks of every 2 SPAN x 2 SPAN block of v (W, W), and so
// on down to single elements: a transpose in log2(W) steps.
template <int SPAN, int W, typename V> GPTK_INLINE void transpose(V (&v)[W]) {
  if constexpr (SPAN > 0) {
    using Lane = std::make_integer_sequence<int, W>;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      if (i & SPAN) continue;
      const V a = v[i], b = v[i + SPAN];
      v[i] = exchange<false, SPAN>(a, b, Lane());
      v[i + SPAN] = exchange<true, SPAN>(a, b, Lane());
    }
    transpose<SPAN / 2>(v);
  }
}

// One panel of a transposed B operand: dst[c * PANEL + r], r < rows <= PANEL; absent rows are 0.
template <typename T, typename A>
void pack_transposed(const T* src, int64_t row_stride, int64_t rows, int64_t cols, A* dst) {
  constexpr int W = Lanes<A>::value, PANEL = Panel<A>::value;
  for (int half = 0; half < PANEL; half += W) {
    for (int64_t c = 0; c < cols; c += W) {
      const int width = static_cast<int>(smaller(W, cols - c));
      Vec<A> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        const T* row = src + (half + i) * row_stride + c;
        v[i] = half + i >= rows ? zero<A>() : width == W ? load(row) : load(row, width);
      }
      transpose<W / 2>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        if (i < width) store(dst + (c + i) * PANEL + half, v[i]);
    }
  }
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
