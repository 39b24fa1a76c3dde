// Splitting independent work over threads, the same for any number of them.
//
// What one call of f computes is fixed by the shape alone; threads only decide who makes the call.
// So results are equal bit for bit for every thread count, provided that each call writes its own
// memory (a reduction keeps one partial result per chunk and adds them in order afterwards).
//
// OpenMP 4.5, on the runtime that torch has already loaded. Compiled without OpenMP, or called
// inside another parallel region, or with num_threads <= 1, it is a plain loop that never enters
// the OpenMP runtime.
#pragma once

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef GPTK_ISA
#define GPTK_ISA baseline
#endif

namespace gptk {
namespace GPTK_ISA {
namespace {

// f(i, thread) for i in [0, n); 0 <= thread < num_threads names the scratch memory of the call.
// Calls may differ in cost (causal attention): threads take the next one when they are free, in
// increasing order.
template <typename F> void parallel_for_threads(int64_t n, int num_threads, const F& f) {
#ifdef _OPENMP
  if (num_threads > 1 && n > 1 && !omp_in_parallel()) {
    int threads = n < num_threads ? static_cast<int>(n) : num_threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < n; i++) f(i, omp_get_thread_num());
    return;
  }
#endif
  (void)num_threads;
  for (int64_t i = 0; i < n; i++) f(i, 0);
}

// f(i) for i in [0, n).
template <typename F> void parallel_for(int64_t n, int num_threads, const F& f) {
  parallel_for_threads(n, num_threads, [&](int64_t i, int) { f(i); });
}

// Rows [0, n) in chunks of chunk_rows: f(chunk, begin, end). For reductions over rows: chunk_rows
// must be a function of the shape, and partial results are indexed by chunk.
template <typename F>
void parallel_chunks(int64_t n, int64_t chunk_rows, int num_threads, const F& f) {
  int64_t chunks = (n + chunk_rows - 1) / chunk_rows;
  parallel_for(chunks, num_threads, [&](int64_t chunk) {
    int64_t begin = chunk * chunk_rows;
    int64_t end = begin + chunk_rows < n ? begin + chunk_rows : n;
    f(chunk, begin, end);
  });
}

// Rows [0, n) in at most 64 chunks of equal length: f(begin, end). For rows that do not meet.
template <typename F> void parallel_rows(int64_t n, int num_threads, const F& f) {
  int64_t chunk_rows = (n + 63) / 64;
  parallel_chunks(n, chunk_rows > 0 ? chunk_rows : 1, num_threads,
                  [&](int64_t, int64_t begin, int64_t end) { f(begin, end); });
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
