// Philox keep masks, a run of columns of one row at a time (see philox.h for the rule).
//
// A 64-bit lane carries one counter, each of its four words in the low half of a vector of its own;
// what gathers in the high halves is never read. Two vectors advance side by side to hide latency.
#pragma once

#include "philox.h"
#include "vec_math.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

constexpr int WORDS = 64;  // random words per step: 16 counters of 4 words

// words[i] = the random word of (row, 4 * counter0 + i), i < WORDS; `last` is the counter's last
// word.
inline void random_words(uint64_t seed, uint64_t row, uint32_t counter0, uint32_t last,
                         uint32_t* words) {
  constexpr int L = Lanes<double>::value, VECTORS = 2;
  const VecU64 m0 = VecU64{} + uint64_t{GPTK_PHILOX_M0}, m1 = VecU64{} + uint64_t{GPTK_PHILOX_M1};
  VecU64 lane = {};
  for (int i = 0; i < L; i++) lane[i] = static_cast<uint64_t>(i);
  for (int first = 0; first < WORDS / 4; first += VECTORS * L) {
    VecU64 c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
      c0[v] = lane + (counter0 + static_cast<uint32_t>(first + v * L));
      c1[v] = VecU64{} + row;
      c2[v] = VecU64{} + (row >> 32);
      c3[v] = VecU64{} + last;
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) {
        const VecU64 product0 = multiply_low_halves(c0[v], m0);
        const VecU64 product1 = multiply_low_halves(c2[v], m1);
        c0[v] = (product1 >> 32) ^ c1[v] ^ key0;
        c1[v] = product1;
        c2[v] = (product0 >> 32) ^ c3[v] ^ key1;
        c3[v] = product0;
      }
      key0 += GPTK_PHILOX_W0;
      key1 += GPTK_PHILOX_W1;
    }
    for (int v = 0; v < VECTORS; v++) {
      const VecU64 low = (c0[v] & 0xffffffffu) | (c1[v] << 32);
      const VecU64 high = (c2[v] & 0xffffffffu) | (c3[v] << 32);
      uint32_t* to = words + 4 * (first + v * L);
#if defined(__AVX512F__)
      const __m512i begin = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
      const __m512i end = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi64((__m512i)low, begin, (__m512i)high));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64((__m512i)low, end, (__m512i)high));
#else
      for (int i = 0; i < L; i++) {
        const uint64_t pair[2] = {low[i], high[i]};
        __builtin_memcpy(to + 4 * i, pair, sizeof pair);
      }
#endif
    }
  }
}

// out[i] = scale where (row, col0 + i) is kept, else 0, for i < count; col0 is a multiple of 4.
template <typename A>
void keep_scale_row(uint64_t seed, uint64_t row, int64_t col0, int64_t count, uint64_t threshold,
                    A scale, A* out) {
  if (threshold == 0) {
    for (int64_t i = 0; i < count; i++) out[i] = scale;
    return;
  }
  // keep iff word > below, which a threshold of 2^32 allows too
  const uint32_t below = static_cast<uint32_t>(threshold - 1);
  uint32_t words[WORDS];
  for (int64_t begin = 0; begin < count; begin += WORDS) {
    random_words(seed, row, static_cast<uint32_t>((col0 + begin) >> 2), 0, words);
    const int64_t n = count - begin < WORDS ? count - begin : WORDS;
    for (int64_t i = 0; i < n; i++) out[begin + i] = words[i] > below ? scale : A(0);
  }
}

// 1 / (1 - p); 0 for p = 1, where nothing is kept.
GPTK_INLINE double keep_scale(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
