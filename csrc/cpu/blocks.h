// Rows in blocks of accumulation values, whatever their storage dtype, so that a row kernel is
// written once.
//
// read_block gives a pointer to A values: into the tensor itself when it is stored as A (no copy),
// else into a scratch array on the stack that the values were converted to. write_block is its
// counterpart. for_lanes walks a block vector by vector and masks the tail.
#pragma once

#include "gptk.h"
#include "parallel.h"
#include "vec.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

constexpr int64_t BLOCK = 512;  // elements: a float block is 2 KB, a handful of them fits in L1

GPTK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Below this many elements a parallel region costs more than it saves.
GPTK_INLINE int threads_for(int64_t elements, int threads) {
  return elements < 16384 ? 1 : threads;
}

// Calls f.template operator()<A>() with the accumulation type of a dtype code.
#define GPTK_WITH_ACC(dtype, function, args) \
  ((dtype) == GPTK_FLOAT64 ? function<double>(args) : function<float>(args))

// --- lanes ---------------------------------------------------------------------------------

struct All {};  // every lane; an int in its place: the first n lanes

template <typename T> GPTK_INLINE auto load(const T* p, All) -> decltype(load(p)) {
  return load(p);
}
template <typename T, typename V> GPTK_INLINE void store(T* p, V v, All) { store(p, v); }

// f(i, lanes, k) for i = 0, L, 2L, ... < n. k in 0..3 names one of four independent accumulators,
// so that additions need not wait for each other.
template <typename A, typename F> GPTK_INLINE void for_lanes(int64_t n, const F& f) {
  constexpr int L = Lanes<A>::value;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    f(i, All(), 0);
    f(i + L, All(), 1);
    f(i + 2 * L, All(), 2);
    f(i + 3 * L, All(), 3);
  }
  for (; i + L <= n; i += L) f(i, All(), 0);
  if (i < n) f(i, static_cast<int>(n - i), 0);
}

#define GPTK_LANES [&](int64_t i, auto lanes, [[maybe_unused]] int k) __attribute__((always_inline))

template <typename A> struct Accumulators {
  Vec<A> part[4] = {};
  GPTK_INLINE A total() const { return hsum((part[0] + part[1]) + (part[2] + part[3])); }
};

// Absent lanes hold 0; where 0 is not neutral, this replaces them.
GPTK_INLINE VecF only(VecF v, All, VecF) { return v; }
GPTK_INLINE VecD only(VecD v, All, VecD) { return v; }
#if defined(__AVX512F__)
GPTK_INLINE VecF only(VecF v, int lanes, VecF otherwise) {
  return _mm512_mask_mov_ps(otherwise, (__mmask16)((1u << lanes) - 1), v);
}
GPTK_INLINE VecD only(VecD v, int lanes, VecD otherwise) {
  return _mm512_mask_mov_pd(otherwise, (__mmask8)((1u << lanes) - 1), v);
}
#else
GPTK_INLINE VecF only(VecF v, int lanes, VecF otherwise) {
  for (int i = lanes; i < Lanes<float>::value; i++) v[i] = otherwise[i];
  return v;
}
GPTK_INLINE VecD only(VecD v, int lanes, VecD otherwise) {
  for (int i = lanes; i < Lanes<double>::value; i++) v[i] = otherwise[i];
  return v;
}
#endif

// --- blocks --------------------------------------------------------------------------------

template <typename A, typename T> void convert_from(const T* from, int64_t n, A* to) {
  constexpr int L = Lanes<float>::value;
  int64_t i = 0;
  if constexpr (sizeof(A) == sizeof(float) && sizeof(T) <= sizeof(float))
    for (; i + L <= n; i += L) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = static_cast<A>(to_acc(from[i]));
}

template <typename A, typename T> void convert_to(const A* from, int64_t n, T* to) {
  constexpr int L = Lanes<float>::value;
  int64_t i = 0;
  if constexpr (sizeof(A) == sizeof(float) && sizeof(T) <= sizeof(float))
    for (; i + L <= n; i += L) store(to + i, load(from + i));
  for (; i < n; i++) store_one(to + i, static_cast<Acc<T>>(from[i]));
}

template <typename A> constexpr int32_t own_dtype() {
  return sizeof(A) == sizeof(double) ? GPTK_FLOAT64 : GPTK_FLOAT32;
}

// n values of a tensor from element `offset` on, as A.
template <typename A>
GPTK_INLINE const A* read_block(const void* base, int32_t dtype, int64_t offset, int64_t n,
                                A* scratch) {
  if (dtype == own_dtype<A>()) return static_cast<const A*>(base) + offset;
  switch (dtype) {
  case GPTK_BFLOAT16:
    convert_from(static_cast<const bf16*>(base) + offset, n, scratch);
    break;
  case GPTK_FLOAT16:
    convert_from(static_cast<const fp16*>(base) + offset, n, scratch);
    break;
  case GPTK_FLOAT32:
    convert_from(static_cast<const float*>(base) + offset, n, scratch);
    break;
  default:
    convert_from(static_cast<const double*>(base) + offset, n, scratch);
    break;
  }
  return scratch;
}

// Where to put values that write_block will then bring into the tensor.
template <typename A>
GPTK_INLINE A* target_block(void* base, int32_t dtype, int64_t offset, A* scratch) {
  return dtype == own_dtype<A>() ? static_cast<A*>(base) + offset : scratch;
}

template <typename A>
GPTK_INLINE void write_block(void* base, int32_t dtype, int64_t offset, int64_t n,
                             const A* values) {
  if (dtype == own_dtype<A>() && values == static_cast<A*>(base) + offset) return;
  switch (dtype) {
  case GPTK_BFLOAT16:
    convert_to(values, n, static_cast<bf16*>(base) + offset);
    break;
  case GPTK_FLOAT16:
    convert_to(values, n, static_cast<fp16*>(base) + offset);
    break;
  case GPTK_FLOAT32:
    convert_to(values, n, static_cast<float*>(base) + offset);
    break;
  default:
    convert_to(values, n, static_cast<double*>(base) + offset);
    break;
  }
}

template <typename A> A read_one(const void* base, int32_t dtype, int64_t offset) {
  A value;
  return *read_block(base, dtype, offset, 1, &value);
}

// --- sums over rows --------------------------------------------------------------------------

// First row of a group when M rows are split into `groups` runs of nearly equal length.
GPTK_INLINE int64_t group_begin(int64_t M, int64_t groups, int64_t group) {
  return M / groups * group + min(group, M % groups);
}

// sum (N,) = partial (groups, N) summed over groups in order: the second stage of every sum over
// rows.
template <typename A>
void sum_groups(void* sum, int32_t dtype, const A* partial, int64_t groups, int64_t N,
                int threads) {
  parallel_chunks(N, BLOCK, threads_for(groups * N, threads),
                  [&](int64_t, int64_t begin, int64_t end) {
                    A total[BLOCK];
                    for (int64_t j = 0; j < end - begin; j++) total[j] = 0;
                    for (int64_t group = 0; group < groups; group++)
                      for (int64_t j = 0; j < end - begin; j++)
                        total[j] += partial[group * N + begin + j];
                    write_block(sum, dtype, begin, end - begin, total);
                  });
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
