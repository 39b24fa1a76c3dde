// Philox keep masks, a run of columns of one row at a time (see philox.h for the rule).
//
// Sixteen counters advance side by side in plain arrays; compilers turn the 32 x 32 -> 64 bit products into vector
// instructions on every ISA.
#pragma once

#include "philox.h"
#include "vec.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

constexpr int64_t WORDS = 64;  // random words per step: 16 counters of 4 lanes

// words[i] = the random word of (row, 4 * counter0 + i), i < WORDS.
inline void random_words(uint64_t seed, uint64_t row, uint32_t counter0, uint32_t* words) {
  uint32_t c0[16], c1[16], c2[16], c3[16];
  for (uint32_t i = 0; i < 16; i++) {
    c0[i] = counter0 + i;
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(row >> 32);
    c3[i] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < 16; i++) {
      const uint64_t product0 = static_cast<uint64_t>(c0[i]) * GPTK_PHILOX_M0;
      const uint64_t product1 = static_cast<uint64_t>(c2[i]) * GPTK_PHILOX_M1;
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
      c1[i] = static_cast<uint32_t>(product1);
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
      c3[i] = static_cast<uint32_t>(product0);
    }
    key0 += GPTK_PHILOX_W0;
    key1 += GPTK_PHILOX_W1;
  }
  for (int i = 0; i < 16; i++) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// out[i] = scale where (row, col0 + i) is kept, else 0, for i < count. col0 must be a multiple of 4.
template <typename A>
void keep_scale_row(uint64_t seed, uint64_t row, int64_t col0, int64_t count, uint64_t threshold,
                    A scale, A* out) {
  if (threshold == 0) {
    for (int64_t i = 0; i < count; i++) out[i] = scale;
    return;
  }
  const uint32_t below =
      static_cast<uint32_t>(threshold - 1);  // keep iff word > below, also for 2^32
  uint32_t words[WORDS];
  for (int64_t begin = 0; begin < count; begin += WORDS) {
    random_words(seed, row, static_cast<uint32_t>((col0 + begin) >> 2), words);
    const int64_t n = count - begin < WORDS ? count - begin : WORDS;
    for (int64_t i = 0; i < n; i++) out[begin + i] = words[i] > below ? scale : A(0);
  }
}

// 1 / (1 - p); 0 for p = 1, where nothing is kept.
GPTK_INLINE double keep_scale(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
