// A few rows of a times one column of b after another (decoding): as fast as b can be read. b's
// columns are adjacent along k (a weight of nn.Linear).
#pragma once

#include "blocks.h"
#include "gemm_pack.h"
#include "gemm_plan.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

using gemm_plan::ceil_div;

// A row of a as it is kept, and its products with a vector of values of b's column, summed. PARTS
// sums per row, so that additions need not wait for each other.
template <typename E> struct NarrowRow {
  using Kept = E;
  using Sum = Vec<E>;
  static constexpr int PARTS = 4;
  static constexpr int64_t VALUES = Lanes<E>::value;
  static GPTK_INLINE int64_t row_elements(int64_t K) { return K; }
  template <typename T> static void pack(const T* from, int64_t K, Kept* row) {
    for (int64_t k = 0; k < K; k++) row[k] = static_cast<E>(to_acc(from[k]));
  }
  template <typename T, typename L> static GPTK_INLINE Vec<E> column(const T* b, L lanes) {
    return load(b, lanes);
  }
  template <typename L>
  static GPTK_INLINE Sum add(const Kept* row, int64_t k, L lanes, Vec<E> column, Sum sum) {
    return fma(load(row + k, lanes), column, sum);
  }
  static GPTK_INLINE E total(const Sum* s) { return hsum((s[0] + s[1]) + (s[2] + s[3])); }
};

// float products are summed in double: memory is what the time goes into, and for a row or two
// others sum in an order that is more exact than one after the other.
template <> struct NarrowRow<float> {
  typedef float Half __attribute__((vector_size(GPTK_VEC_BYTES / 2)));
  using Kept = double;
  struct Sum {
    VecD low, high;
  };
  static constexpr int PARTS = 2;
  static constexpr int64_t VALUES = Lanes<float>::value;
  static GPTK_INLINE int64_t row_elements(int64_t K) { return ceil_div(K, VALUES) * VALUES; }
  template <typename T> static void pack(const T* from, int64_t K, Kept* row) {
    for (int64_t k = 0; k < row_elements(K); k++)
      row[k] = k < K ? static_cast<double>(to_acc(from[k])) : 0.0;
  }
  template <typename T, typename L> static GPTK_INLINE VecF column(const T* b, L lanes) {
    return load(b, lanes);
  }
  template <typename L>
  static GPTK_INLINE Sum add(const Kept* row, int64_t k, L, VecF column, Sum sum) {
    Half half[2];
    __builtin_memcpy(half, &column, sizeof half);
    sum.low = fma(load(row + k), __builtin_convertvector(half[0], VecD), sum.low);
    sum.high = fma(load(row + k + VALUES / 2), __builtin_convertvector(half[1], VecD), sum.high);
    return sum;
  }
  static GPTK_INLINE float total(const Sum* s) {
    return static_cast<float>(hsum((s[0].low + s[0].high) + (s[1].low + s[1].high)));
  }
};

#if defined(__AVX512BF16__)
template <> struct NarrowRow<Pair> {
  using Kept = Pair;
  using Sum = VecF;
  static constexpr int PARTS = 4;
  static constexpr int64_t VALUES = 32;
  static GPTK_INLINE int64_t row_elements(int64_t K) { return ceil_div(K, VALUES) * 16; }
  template <typename T> static void pack(const T* from, int64_t K, Kept* row) {
    for (int64_t k = 0; k < K; k += VALUES)
      _mm512_storeu_si512(row + k / 2, K - k >= VALUES ? pairs(from + k)
                                                       : pairs(from + k, static_cast<int>(K - k)));
  }
  template <typename T> static GPTK_INLINE __m512i column(const T* b, All) { return pairs(b); }
  template <typename T> static GPTK_INLINE __m512i column(const T* b, int n) { return pairs(b, n); }
  template <typename L>
  static GPTK_INLINE Sum add(const Kept* row, int64_t k, L, __m512i column, Sum sum) {
    return ElementOf<Pair>::multiply_add(_mm512_loadu_si512(row + k / 2), column, sum);
  }
  static GPTK_INLINE float total(const Sum* s) { return hsum((s[0] + s[1]) + (s[2] + s[3])); }
};
#endif

// dot[m * dot_m] = sum_k a[m, k] b[k]. Column after column, b is read straight through, as hardware
// prefetchers like it: with four columns side by side it came at half the bandwidth.
template <int M, typename E, typename TB, typename A = typename ElementOf<E>::acc>
void dot_products(const typename NarrowRow<E>::Kept* a, int64_t K, const TB* b, A* dot,
                  int64_t dot_m) {
  using Row = NarrowRow<E>;
  constexpr int PARTS = Row::PARTS;
  const int64_t lda = Row::row_elements(K);
  typename Row::Sum sum[M][PARTS] = {};
  const auto step = [&](int64_t k, int part, auto lanes) __attribute__((always_inline)) {
    const auto column = Row::column(b + k, lanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
      sum[m][part] = Row::add(a + m * lda, k, lanes, column, sum[m][part]);
  };
  int64_t k = 0;
  for (; k + PARTS * Row::VALUES <= K; k += PARTS * Row::VALUES) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) step(k + part * Row::VALUES, part, All());
  }
  for (; k + Row::VALUES <= K; k += Row::VALUES) step(k, 0, All());
  if (k < K) step(k, 1, static_cast<int>(K - k));
  for (int m = 0; m < M; m++) dot[m * dot_m] = Row::total(sum[m]);
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
