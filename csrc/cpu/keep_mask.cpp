// keep (rows, cols) bytes: 1 where the dropout rule keeps, the same bits as gptk.random.keep_mask.
// Threads: rows. Every element depends on (seed, row, column) alone.
#include "blocks.h"
#include "dropout.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

void keep_row(const gptk_keep_mask_args& a, int64_t row, uint64_t threshold) {
  float keep[BLOCK];
  for (int64_t begin = 0; begin < a.cols; begin += BLOCK) {
    const int64_t n = min(a.cols - begin, BLOCK);
    keep_scale_row(a.seed, static_cast<uint64_t>(row), begin, n, threshold, 1.0f, keep);
    uint8_t* out = a.keep + row * a.cols + begin;
    for (int64_t i = 0; i < n; i++) out[i] = keep[i] != 0.0f;
  }
}

}  // namespace

void keep_mask(const gptk_keep_mask_args& a) {
  const uint64_t threshold = gptk_keep_threshold(a.dropout_p);
  parallel_rows(a.rows, threads_for(a.rows * a.cols, a.threads), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) keep_row(a, row, threshold);
  });
}

}  // namespace GPTK_ISA
}  // namespace gptk
