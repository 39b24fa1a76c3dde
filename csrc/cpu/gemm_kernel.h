// The register kernel of a matrix product, for one panel of b.
//
// A kernel call keeps ROWS x 2 vectors of sums in registers while it reads a panel of b, (K, 2
// vectors), straight through and broadcasts a's elements.
#pragma once

#include "gemm_tile.h"
#include "vec.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

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
