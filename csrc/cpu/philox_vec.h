// Philox4x32-10 (see philox.h), one counter per vector lane: a run of rows at the same columns.
//
// A 32 x 32 -> 64 bit product needs a 64-bit lane. So the even lanes' counters travel in one vector
// and the odd lanes' in another, each in the low half of a 64-bit lane; what the high halves hold
// is never read.
#pragma once

#include "philox.h"
#include "vec_math.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

// words[t] lane i = the random word of (row0 + i, 4 * counter0 + t), i < Lanes<float>, t < 4.
GPTK_INLINE void random_words_of_rows(uint64_t seed, uint64_t row0, uint32_t counter0,
                                      VecU32 words[4]) {
  const VecU64 m0 = VecU64{} + uint64_t{GPTK_PHILOX_M0}, m1 = VecU64{} + uint64_t{GPTK_PHILOX_M1};
  VecU64 even = {};
  for (int i = 0; i < Lanes<double>::value; i++) even[i] = 2 * static_cast<uint64_t>(i);
  VecU64 c0[2], c1[2], c2[2], c3[2];
  for (uint64_t odd = 0; odd < 2; odd++) {
    c0[odd] = VecU64{} + counter0;
    c1[odd] = even + (row0 + odd);
    c2[odd] = c1[odd] >> 32;
    c3[odd] = VecU64{};
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      const VecU64 product0 = multiply_low_halves(c0[odd], m0);
      const VecU64 product1 = multiply_low_halves(c2[odd], m1);
      c0[odd] = (product1 >> 32) ^ c1[odd] ^ key0;
      c1[odd] = product1;
      c2[odd] = (product0 >> 32) ^ c3[odd] ^ key1;
      c3[odd] = product0;
    }
    key0 += GPTK_PHILOX_W0;
    key1 += GPTK_PHILOX_W1;
  }
  words[0] = (VecU32)((c0[0] & 0xffffffffu) | (c0[1] << 32));
  words[1] = (VecU32)((c1[0] & 0xffffffffu) | (c1[1] << 32));
  words[2] = (VecU32)((c2[0] & 0xffffffffu) | (c2[1] << 32));
  words[3] = (VecU32)((c3[0] & 0xffffffffu) | (c3[1] << 32));
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
