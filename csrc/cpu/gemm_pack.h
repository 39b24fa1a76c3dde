// Packing for matrix products: sources of any storage dtype and either order of strides become
// panels (b) and stripes (a) of elements, rounded to the compute dtype on the way.
#pragma once

#include "gemm_tile.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

// A float in memory that counts as the 16-bit value that it rounds to.
template <typename Half> struct Rounded {
  float x;
};
template <typename Half> GPTK_INLINE VecF load(const Rounded<Half>* p) {
  return widen(narrow(load(&p->x), Half()), Half());
}
template <typename Half> GPTK_INLINE VecF load(const Rounded<Half>* p, int n) {
  return widen(narrow(load(&p->x, n), Half()), Half());
}
template <typename Half> GPTK_INLINE float to_acc(Rounded<Half> r) { return load(&r, 1)[0]; }

// --- one element per k ---------------------------------------------------------------------

// A stripe of a with rows adjacent in memory (a_m = 1): panels of KERNEL_ROWS,
// dst[panel][k * KERNEL_ROWS + m]. Absent rows are not written: no kernel call reads them.
template <typename T, typename E>
void pack_columns(const T* src, int64_t a_k, int64_t rows, int64_t K, E* dst) {
  for (int64_t k = 0; k < K; k++, src += a_k) {
    E* to = dst + k * KERNEL_ROWS;
    int64_t m = 0;
    for (; m + KERNEL_ROWS <= rows; m += KERNEL_ROWS, to += K * KERNEL_ROWS)
      for (int i = 0; i < KERNEL_ROWS; i++) to[i] = static_cast<E>(to_acc(src[m + i]));
    for (int i = 0; m + i < rows; i++) to[i] = static_cast<E>(to_acc(src[m + i]));
  }
}

template <typename T, typename E>
void pack_a_rows(const T* src, int64_t a_m, int64_t rows, int64_t K, int64_t ld, E* dst) {
  for (int64_t m = 0; m < rows; m++, src += a_m, dst += ld) pack_rows(src, K, 1, K, dst);
}

template <typename T, typename E>
void pack_b_panel(const T* src, int64_t b_k, int64_t b_n, int64_t K, int64_t columns, E* dst) {
  constexpr int PANEL = Panel<E>::value;
  if (b_n == 1)
    pack_panels(src, b_k, K, smaller(columns, PANEL), dst);
  else
    pack_transposed(src, b_n, columns, K, dst);
}

// --- pairs ---------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

GPTK_INLINE __m512i bits_of(VecU16 h) { return _mm512_cvtepu16_epi32((__m256i)h); }
GPTK_INLINE __m512i halves(const bf16* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
GPTK_INLINE __m512i halves(const bf16* p, int n) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}
GPTK_INLINE __m512i halves(const Rounded<bf16>* p) {
  return bits_of((VecU16)_mm512_cvtneps_pbh(load(&p->x)));
}
GPTK_INLINE __m512i halves(const Rounded<bf16>* p, int n) {
  return bits_of((VecU16)_mm512_cvtneps_pbh(load(&p->x, n)));
}
GPTK_INLINE __m512i join(__m512i even, __m512i odd) {
  return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

// 16 pairs from 32 values that are neighbours along k.
GPTK_INLINE __m512i pairs(const bf16* p) { return _mm512_loadu_si512(p); }
GPTK_INLINE __m512i pairs(const bf16* p, int n) {
  return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
GPTK_INLINE __m512i pairs(const Rounded<bf16>* p) {
  return (__m512i)_mm512_cvtne2ps_pbh(load(&p[16].x), load(&p[0].x));
}
GPTK_INLINE __m512i pairs(const Rounded<bf16>* p, int n) {
  const int first = n < 16 ? n : 16;
  return (__m512i)_mm512_cvtne2ps_pbh(n > 16 ? load(&p[16].x, n - 16) : zero<float>(),
                                      load(&p[0].x, first));
}

template <typename T>
void pack_a_rows(const T* src, int64_t a_m, int64_t rows, int64_t K, int64_t ld, Pair* dst) {
  for (int64_t m = 0; m < rows; m++, src += a_m, dst += ld) {
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) _mm512_storeu_si512(dst + k / 2, pairs(src + k));
    if (k < K)
      _mm512_mask_storeu_epi32(dst + k / 2, (__mmask16)((1u << ((K - k + 1) / 2)) - 1),
                               pairs(src + k, static_cast<int>(K - k)));
  }
}

template <typename T>
void pack_columns(const T* src, int64_t a_k, int64_t rows, int64_t K, Pair* dst) {
  static_assert(KERNEL_ROWS == 8, "two panels per vector");
  const int64_t panel = (K + 1) / 2 * 8;
  for (int64_t k = 0; k < K; k += 2, src += 2 * a_k, dst += 8) {
    Pair* to = dst;
    for (int64_t m = 0; m < rows; m += 16, to += 2 * panel) {
      const int n = static_cast<int>(smaller(16, rows - m));
      const T* odd_row = src + a_k + m;
      const __m512i even = n == 16 ? halves(src + m) : halves(src + m, n);
      const __m512i odd = k + 1 == K ? _mm512_setzero_si512()
                          : n == 16  ? halves(odd_row)
                                     : halves(odd_row, n);
      const __m512i both = join(even, odd);
      _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(both));
      if (n > 8) _mm256_storeu_si256((__m256i*)(to + panel), _mm512_extracti64x4_epi64(both, 1));
    }
  }
}

template <typename T>
void pack_b_panel(const T* src, int64_t b_k, int64_t b_n, int64_t K, int64_t columns, Pair* dst) {
  if (b_n == 1) {
    for (int64_t k = 0; k < K; k += 2, src += 2 * b_k, dst += 32) {
      for (int v = 0; v < 2; v++) {
        const int n = static_cast<int>(larger(0, smaller(16, columns - 16 * v)));
        const T* even_row = src + 16 * v;
        const T* odd_row = even_row + b_k;
        const __m512i even = n == 16 ? halves(even_row) : halves(even_row, n);
        const __m512i odd = k + 1 == K ? _mm512_setzero_si512()
                            : n == 16  ? halves(odd_row)
                                       : halves(odd_row, n);
        _mm512_storeu_si512(dst + 16 * v, join(even, odd));
      }
    }
    return;
  }
  // b_k == 1: 16 columns by 32 k are a 16 x 16 square of pairs, to be transposed
  for (int v = 0; v < 2; v++) {
    for (int64_t k = 0; k < K; k += 32) {
      const int n = static_cast<int>(smaller(32, K - k));
      VecI32 square[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const T* column = src + (16 * v + i) * b_n + k;
        square[i] = 16 * v + i >= columns ? VecI32{}
                    : n == 32             ? (VecI32)pairs(column)
                                          : (VecI32)pairs(column, n);
      }
      transpose<8>(square);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        if (2 * i < n) _mm512_storeu_si512(dst + (k / 2 + i) * 32 + 16 * v, (__m512i)square[i]);
    }
  }
}

#endif

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
