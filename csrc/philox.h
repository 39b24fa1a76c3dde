/* Philox4x32-10, the one random generator, shared by CPU and CUDA. Counter-based: a keep mask is a
   pure function of (seed, row, column), so backward draws it again instead of storing it.

     key = (seed low 32, seed high 32)    counter = (column >> 2, row low 32, row high 32, 0)
     lane = column & 3                    keep iff value >= round(p * 2^32)

   AdamW's stochastic rounding draws from the same generator: row = the parameter's place, column =
   the element, and the counter's last word is the number t >= 1 of the parameter's update, so that
   no dropout mask has the same counters. The low 16 bits of the word are added below the bits that
   bfloat16 keeps, and the sum is truncated.

   Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). */
#ifndef GPTK_PHILOX_H
#define GPTK_PHILOX_H

#include <stdint.h>

#ifdef __CUDACC__
#define GPTK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GPTK_HOST_DEVICE
#endif

enum : uint32_t {
  GPTK_PHILOX_M0 = 0xD2511F53u,
  GPTK_PHILOX_M1 = 0xCD9E8D57u,
  GPTK_PHILOX_W0 = 0x9E3779B9u,
  GPTK_PHILOX_W1 = 0xBB67AE85u,
};

/* counter (4,) in, four random words out in its place. */
GPTK_HOST_DEVICE static inline void gptk_philox(uint32_t key0, uint32_t key1, uint32_t counter[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = (uint64_t)GPTK_PHILOX_M0 * c0;
    const uint64_t product1 = (uint64_t)GPTK_PHILOX_M1 * c2;
    c0 = (uint32_t)(product1 >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)product1;
    c2 = (uint32_t)(product0 >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)product0;
    key0 += GPTK_PHILOX_W0;
    key1 += GPTK_PHILOX_W1;
  }
  counter[0] = c0;
  counter[1] = c1;
  counter[2] = c2;
  counter[3] = c3;
}

/* round(p * 2^32), ties to even: 0 keeps everything, 2^32 (p = 1) nothing. p * 2^32 is exact,
 * adding 2^52 rounds. */
GPTK_HOST_DEVICE static inline uint64_t gptk_keep_threshold(double p) {
  volatile double rounded = p * 4294967296.0 + 4503599627370496.0;
  return (uint64_t)(rounded - 4503599627370496.0);
}

#endif
