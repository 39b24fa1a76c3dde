// How a matrix product is cut into work items, and how much scratch it needs. Where sums are cut is
// a function of the shape alone, so that results never depend on the thread count; which rows make
// a work item depends on it, too, and changes no sum.
// Shared by the kernels, which are compiled once per ISA, and by the bindings: all static.
#pragma once

#include <stdint.h>

namespace gptk {
namespace gemm_plan {

enum : int64_t {
  MOST_DEPTH = 4096,      // k of one pass: between passes sums go through memory
  MOST_PACKED = 3 << 19,  // elements of b packed at once: 6 MB of float32, 3 MB of bf16
  MOST_ROWS = 96,         // of a packed at once: 590 KB of float32, in the second level
  CHUNK = 384,            // elements summed in registers before they are added to a tile
  WIDEST_PANEL = 32,
  ROW_STEP = 8,     // rows of the widest kernel
  WHOLE_ROWS = 24,  // a multiple of every kernel's rows, 4, 6 and 8: packed rows come in these
  NARROW = 4,       // rows of a below which packing b would cost more than the product
  PADDING = 16,     // elements after each row of a packed a: rows fall into different cache sets
};

static inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// K cut into equal passes, even for the sake of bf16 pairs.
static inline int64_t depth(int64_t K) {
  const int64_t passes = ceil_div(K, MOST_DEPTH);
  return passes > 1 ? ceil_div(ceil_div(K, passes), 8) * 8 : K;
}

static inline int64_t columns(int64_t N, int64_t K) {
  const int64_t passes = ceil_div(N, MOST_PACKED / (depth(K) > CHUNK ? depth(K) : CHUNK));
  return ceil_div(ceil_div(N, passes > 0 ? passes : 1), WIDEST_PANEL) * WIDEST_PANEL;
}

// Rows of a work item. Threads take one after the other, so what counts is the rows of the busiest
// thread; of equals the taller item, which reads the packed b less often.
static inline int64_t stripe_rows(int64_t M, int64_t K, int64_t threads) {
  const int64_t most = depth(K) > 1536 ? MOST_ROWS / 2 : MOST_ROWS;
  const int64_t rounds = ceil_div(M, most * threads);  // 0 for no rows
  if (rounds == 0) return ROW_STEP;
  int64_t best = most, best_rows = ceil_div(ceil_div(M, most), threads) * most;
  for (int64_t n = rounds; n < rounds + 4; n++) {
    const int64_t rows = ceil_div(ceil_div(M, n * threads), ROW_STEP) * ROW_STEP;
    const int64_t busiest = ceil_div(ceil_div(M, rows), threads) * rows;
    if (busiest < best_rows || (busiest == best_rows && rows > best && rows <= most))
      best = rows, best_rows = busiest;
  }
  return best < most ? best : most;
}

// Elements of scratch: one packed block of b, a stripe of a per thread, sums of a pass in between.
static inline int64_t packed_b(int64_t N, int64_t K) { return columns(N, K) * (depth(K) + 1); }
static inline int64_t packed_a(int64_t M, int64_t K, int64_t threads) {
  return ceil_div(stripe_rows(M, K, threads), WHOLE_ROWS) * WHOLE_ROWS * (depth(K) + 1 + PADDING);
}
static inline int64_t sums(int64_t M, int64_t N, int64_t K) {
  return depth(K) < K ? M * columns(N, K) : 0;
}
// A few rows of a against all of b, once: b is read where it lies, a is kept, float as double.
static inline int64_t narrow_a(int64_t M, int64_t K) { return M <= NARROW ? 2 * M * (K + 32) : 0; }

static inline int64_t gemm_scratch(int64_t M, int64_t N, int64_t K, int64_t threads) {
  return narrow_a(M, K) + sums(M, N, K) + packed_b(N, K) + threads * packed_a(M, K, threads);
}

}  // namespace gemm_plan
}  // namespace gptk
