// The register kernel of a matrix product, for one panel of b.
//
// An element of packed a and b is a float, a double, or (AVX-512 BF16) a pair of bf16 that are
// neighbours along k: vdpbf16ps multiplies both and adds the two products to a float sum. A kernel
// call keeps ROWS x 2 vectors of sums in registers while it reads a panel of b (K, 2 vectors)
// straight through and broadcasts a's elements.
#pragma once

#include "gemm_tile.h"
#include "vec.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

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

// out (M, NV vectors) = [out +] sum_k a(m, k) b(k, :), k in elements. a(m, k) lies at
// a[m * a_m + k * a_k].
template <typename E, int M, int NV, typename A = typename ElementOf<E>::acc>
void product_kernel(int64_t K, const E* a, int64_t a_m, int64_t a_k, const E* b, A* out,
                    int64_t out_m, bool add) {
  constexpr int W = Lanes<A>::value;
  using Element = ElementOf<E>;
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
      const typename Element::vector x = Element::all(a[m * a_m]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) sum[m][v] = Element::multiply_add(x, row[v], sum[m][v]);
    }
    a += a_k;
    b += 2 * W;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) {
      A* o = out + m * out_m + v * W;
      store(o, add ? load(o) + sum[m][v] : sum[m][v]);
    }
  }
}

// a packed row by row (ROW_MAJOR: k side by side) or in panels of KERNEL_ROWS (rows side by side):
// a constant distance leaves the compiler one address to keep.
enum class PackedA { rows, panels };

template <typename E, int NV, PackedA LAYOUT, typename A = typename ElementOf<E>::acc>
void product_rows(int rows, int64_t K, const E* a, int64_t lda, const E* b, A* out, int64_t out_m,
                  bool add) {
  const int64_t a_m = LAYOUT == PackedA::rows ? lda : 1;
  constexpr int64_t panel = KERNEL_ROWS;
  const auto step = [&](auto m) __attribute__((always_inline)) {
    if constexpr (LAYOUT == PackedA::rows)
      product_kernel<E, decltype(m)::value, NV>(K, a, a_m, 1, b, out, out_m, add);
    else
      product_kernel<E, decltype(m)::value, NV>(K, a, 1, panel, b, out, out_m, add);
  };
  switch (rows) {
#if defined(__AVX512F__) || defined(__aarch64__)
  case 8:
    return step(std::integral_constant<int, 8>());
  case 7:
    return step(std::integral_constant<int, 7>());
#endif
#if defined(__AVX512F__) || defined(__aarch64__) || defined(__AVX2__)
  case 6:
    return step(std::integral_constant<int, 6>());
  case 5:
    return step(std::integral_constant<int, 5>());
#endif
  case 4:
    return step(std::integral_constant<int, 4>());
  case 3:
    return step(std::integral_constant<int, 3>());
  case 2:
    return step(std::integral_constant<int, 2>());
  case 1:
    return step(std::integral_constant<int, 1>());
  }
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
