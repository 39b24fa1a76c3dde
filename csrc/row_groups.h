// Groups into which rows are split for sums over rows.
#pragma once

#include <stdint.h>

namespace gptk {

// A function of the size alone, so that sums have the same bits for any number of threads: at least
// 16 rows each, at most 64.
static inline int64_t row_groups(int64_t rows) {
  const int64_t groups = (rows + 15) / 16;
  return groups < 64 ? groups : 64;
}

}  // namespace gptk
