// The only file that knows how wide a vector is.
//
// Kernels are written once, against Vec<float> and Vec<double>, and compiled once per ISA level:
//
//   GPTK_ISA       bytes   floats   compiled with
//   baseline         16       4     nothing (SSE2 on x86-64, NEON on aarch64)
//   avx2             32       8     -mavx2 -mfma -mf16c
//   avx512           64      16     -mavx512{f,bw,dq,vl} and the above
//   avx512_bf16      64      16     the above and -mavx512bf16
//
// A Vec is a GCC/Clang vector type: + - * / and comparisons work lane by lane, a comparison gives
// a mask for select(). Intrinsics appear only where a compiler needs help.
//
// Storage types float, double, bf16, fp16 are loaded into, and rounded from, their accumulation
// type Acc<T>: float for all but double. Rounding is to nearest even; NaN stays NaN.
// load(p, n) and store(p, v, n) touch exactly n elements, 0 <= n <= lanes; absent lanes read as 0.
//
// Everything is in an anonymous namespace, and nothing comes from the standard library: an inline
// function shared by two ISA levels would be merged by the linker, and AVX-512 code would then run
// on a machine without it (the one definition rule).
#pragma once

#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef GPTK_ISA
#define GPTK_ISA baseline
#endif

#if defined(__AVX512F__)
#define GPTK_VEC_BYTES 64
#elif defined(__AVX2__)
#define GPTK_VEC_BYTES 32
#else
#define GPTK_VEC_BYTES 16
#endif

#define GPTK_INLINE inline __attribute__((always_inline, unused))

namespace gptk {
namespace GPTK_ISA {
namespace {

// --- types ---------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

typedef float VecF __attribute__((vector_size(GPTK_VEC_BYTES)));
typedef double VecD __attribute__((vector_size(GPTK_VEC_BYTES)));
typedef int32_t VecI32 __attribute__((vector_size(GPTK_VEC_BYTES)));
typedef int64_t VecI64 __attribute__((vector_size(GPTK_VEC_BYTES)));
typedef uint32_t VecU32 __attribute__((vector_size(GPTK_VEC_BYTES)));
typedef uint64_t VecU64 __attribute__((vector_size(GPTK_VEC_BYTES)));
typedef uint16_t VecU16 __attribute__((vector_size(GPTK_VEC_BYTES / 2)));  // as many lanes as VecF

template <typename A> struct VecOf;
template <> struct VecOf<float> {
  typedef VecF type;
  typedef VecI32 mask;
};
template <> struct VecOf<double> {
  typedef VecD type;
  typedef VecI64 mask;
};
template <typename A> using Vec = typename VecOf<A>::type;
template <typename A> using Mask = typename VecOf<A>::mask;  // lanes are 0 or -1

template <typename A> struct Lanes {
  static constexpr int value = GPTK_VEC_BYTES / static_cast<int>(sizeof(A));
};

// The type in which a storage type is accumulated.
template <typename T> struct AccOf {
  typedef float type;
};
template <> struct AccOf<double> {
  typedef double type;
};
template <typename T> using Acc = typename AccOf<T>::type;

// --- arithmetic ----------------------------------------------------------------------------

template <typename A> GPTK_INLINE Vec<A> zero() { return Vec<A>{}; }
// x - 0 is x for every x, so compilers drop it; 0 + x would turn -0 into 0 and cost an addition.
template <typename A> GPTK_INLINE Vec<A> broadcast(A x) { return x - Vec<A>{}; }

GPTK_INLINE VecF select(VecI32 mask, VecF yes, VecF no) { return mask ? yes : no; }
GPTK_INLINE VecD select(VecI64 mask, VecD yes, VecD no) { return mask ? yes : no; }

// max(a, b) is `a > b ? a : b` and min likewise: the second argument where either is NaN.
// fma(a, b, c) = a * b + c, rounded once where the ISA has it (not in baseline x86).
#if defined(__AVX512F__)
GPTK_INLINE VecF max(VecF a, VecF b) { return _mm512_max_ps(a, b); }
GPTK_INLINE VecD max(VecD a, VecD b) { return _mm512_max_pd(a, b); }
GPTK_INLINE VecF min(VecF a, VecF b) { return _mm512_min_ps(a, b); }
GPTK_INLINE VecD min(VecD a, VecD b) { return _mm512_min_pd(a, b); }
GPTK_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
GPTK_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a, b, c); }
GPTK_INLINE VecF sqrt(VecF a) { return _mm512_sqrt_ps(a); }
GPTK_INLINE VecD sqrt(VecD a) { return _mm512_sqrt_pd(a); }
#elif defined(__AVX2__)
GPTK_INLINE VecF max(VecF a, VecF b) { return _mm256_max_ps(a, b); }
GPTK_INLINE VecD max(VecD a, VecD b) { return _mm256_max_pd(a, b); }
GPTK_INLINE VecF min(VecF a, VecF b) { return _mm256_min_ps(a, b); }
GPTK_INLINE VecD min(VecD a, VecD b) { return _mm256_min_pd(a, b); }
GPTK_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
GPTK_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a, b, c); }
GPTK_INLINE VecF sqrt(VecF a) { return _mm256_sqrt_ps(a); }
GPTK_INLINE VecD sqrt(VecD a) { return _mm256_sqrt_pd(a); }
#elif defined(__x86_64__)
GPTK_INLINE VecF max(VecF a, VecF b) { return _mm_max_ps(a, b); }
GPTK_INLINE VecD max(VecD a, VecD b) { return _mm_max_pd(a, b); }
GPTK_INLINE VecF min(VecF a, VecF b) { return _mm_min_ps(a, b); }
GPTK_INLINE VecD min(VecD a, VecD b) { return _mm_min_pd(a, b); }
GPTK_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
GPTK_INLINE VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
GPTK_INLINE VecF sqrt(VecF a) { return _mm_sqrt_ps(a); }
GPTK_INLINE VecD sqrt(VecD a) { return _mm_sqrt_pd(a); }
#else
GPTK_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }
GPTK_INLINE VecD max(VecD a, VecD b) { return a > b ? a : b; }
GPTK_INLINE VecF min(VecF a, VecF b) { return a < b ? a : b; }
GPTK_INLINE VecD min(VecD a, VecD b) { return a < b ? a : b; }
#if defined(__aarch64__)
GPTK_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
GPTK_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
GPTK_INLINE VecF sqrt(VecF a) { return (VecF)vsqrtq_f32((float32x4_t)a); }
GPTK_INLINE VecD sqrt(VecD a) { return (VecD)vsqrtq_f64((float64x2_t)a); }
#else
GPTK_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
GPTK_INLINE VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
GPTK_INLINE VecF sqrt(VecF a) {
  for (int i = 0; i < Lanes<float>::value; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
GPTK_INLINE VecD sqrt(VecD a) {
  for (int i = 0; i < Lanes<double>::value; i++) a[i] = __builtin_sqrt(a[i]);
  return a;
}
#endif
#endif

// Horizontal sum and maximum: halves are folded onto each other, an order fixed by the width.
#if defined(__AVX512F__)
GPTK_INLINE float hsum(VecF v) { return _mm512_reduce_add_ps(v); }
GPTK_INLINE double hsum(VecD v) { return _mm512_reduce_add_pd(v); }
GPTK_INLINE float hmax(VecF v) { return _mm512_reduce_max_ps(v); }
GPTK_INLINE double hmax(VecD v) { return _mm512_reduce_max_pd(v); }
#endif
template <typename V> GPTK_INLINE auto hsum(V v) -> decltype(v[0] + 0) {
  constexpr int n = static_cast<int>(sizeof(V) / sizeof(v[0]));
  decltype(v[0] + 0) lane[n];
  __builtin_memcpy(lane, &v, sizeof(V));
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}
template <typename V> GPTK_INLINE auto hmax(V v) -> decltype(v[0] + 0) {
  constexpr int n = static_cast<int>(sizeof(V) / sizeof(v[0]));
  decltype(v[0] + 0) lane[n];
  __builtin_memcpy(lane, &v, sizeof(V));
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// --- conversions ---------------------------------------------------------------------------

GPTK_INLINE VecF widen(VecU16 h, bf16) { return (VecF)(__builtin_convertvector(h, VecU32) << 16); }

#if defined(__AVX512BF16__)
// Of results below 2^-126 it makes 0.
GPTK_INLINE VecU16 narrow(VecF x, bf16) { return (VecU16)_mm512_cvtneps_pbh(x); }
#else
GPTK_INLINE VecU16 narrow(VecF x, bf16) {
  VecU32 u = (VecU32)x;
  VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VecU32 quiet_nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((VecU32)(x == x ? rounded : quiet_nan), VecU16);
}
#endif

#if defined(__AVX512F__)
GPTK_INLINE VecF widen(VecU16 h, fp16) { return _mm512_cvtph_ps((__m256i)h); }
GPTK_INLINE VecU16 narrow(VecF x, fp16) {
  return (VecU16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
GPTK_INLINE VecF widen(VecU16 h, fp16) { return _mm256_cvtph_ps((__m128i)h); }
GPTK_INLINE VecU16 narrow(VecF x, fp16) {
  return (VecU16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Without conversion instructions: the hardware's own float multiply and add do the rounding.
GPTK_INLINE VecF widen(VecU16 h, fp16) {
  VecU32 u = __builtin_convertvector(h, VecU32);
  VecU32 sign = (u & 0x8000u) << 16, magnitude = u & 0x7fffu;
  VecF finite = (VecF)(magnitude << 13) * 0x1p112f;  // exponent bias 15 -> 127; subnormals too
  VecU32 special = (magnitude << 13) | 0x7f800000u;  // inf, NaN
  return (VecF)((magnitude >= 0x7c00u ? special : (VecU32)finite) | sign);
}
GPTK_INLINE VecU16 narrow(VecF x, fp16) {
  VecU32 u = (VecU32)x;
  VecU32 sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  VecU32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  VecU32 subnormal = (VecU32)((VecF)magnitude + 0.5f) - 0x3f000000u;  // ulp(0.5) = 2^-24
  VecU32 large = magnitude > 0x7f800000u ? VecU32{} + 0x7e00u : VecU32{} + 0x7c00u;
  VecU32 r = magnitude < 0x38800000u ? subnormal : normal;  // below 2^-14
  r = magnitude >= 0x477ff000u ? large : r;                 // rounds to >= 65536
  return __builtin_convertvector((VecU32)(r | sign), VecU16);
}
#endif

// --- load and store ------------------------------------------------------------------------

GPTK_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
GPTK_INLINE VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename Half> GPTK_INLINE VecF load(const Half* p) {
  VecU16 h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h, Half());
}
GPTK_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }
GPTK_INLINE void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof v); }
template <typename Half> GPTK_INLINE void store(Half* p, VecF v) {
  VecU16 h = narrow(v, Half());
  __builtin_memcpy(p, &h, sizeof h);
}

#if defined(__AVX512F__)
GPTK_INLINE VecF load(const float* p, int n) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
GPTK_INLINE VecD load(const double* p, int n) {
  return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
GPTK_INLINE void store(float* p, VecF v, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
}
GPTK_INLINE void store(double* p, VecD v, int n) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), v);
}
#elif defined(__AVX2__)
GPTK_INLINE __m256i first_lanes32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GPTK_INLINE __m256i first_lanes64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
GPTK_INLINE VecF load(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes32(n)); }
GPTK_INLINE VecD load(const double* p, int n) { return _mm256_maskload_pd(p, first_lanes64(n)); }
GPTK_INLINE void store(float* p, VecF v, int n) { _mm256_maskstore_ps(p, first_lanes32(n), v); }
GPTK_INLINE void store(double* p, VecD v, int n) { _mm256_maskstore_pd(p, first_lanes64(n), v); }
#else
GPTK_INLINE VecF load(const float* p, int n) {
  VecF v = {};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}
GPTK_INLINE VecD load(const double* p, int n) {
  VecD v = {};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}
GPTK_INLINE void store(float* p, VecF v, int n) {
  for (int i = 0; i < n; i++) p[i] = v[i];
}
GPTK_INLINE void store(double* p, VecD v, int n) {
  for (int i = 0; i < n; i++) p[i] = v[i];
}
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <typename Half> GPTK_INLINE VecF load(const Half* p, int n) {
  return widen((VecU16)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), Half());
}
template <typename Half> GPTK_INLINE void store(Half* p, VecF v, int n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(v, Half()));
}
#else
template <typename Half> GPTK_INLINE VecF load(const Half* p, int n) {
  VecU16 h = {};
  for (int i = 0; i < n; i++) h[i] = p[i].bits;
  return widen(h, Half());
}
template <typename Half> GPTK_INLINE void store(Half* p, VecF v, int n) {
  VecU16 h = narrow(v, Half());
  for (int i = 0; i < n; i++) p[i].bits = h[i];
}
#endif

// One element, by the same conversions.
GPTK_INLINE float to_acc(float x) { return x; }
GPTK_INLINE double to_acc(double x) { return x; }
template <typename Half> GPTK_INLINE float to_acc(Half x) { return load(&x, 1)[0]; }
GPTK_INLINE void store_one(float* p, float x) { *p = x; }
GPTK_INLINE void store_one(double* p, double x) { *p = x; }
template <typename Half> GPTK_INLINE void store_one(Half* p, float x) {
  p->bits = narrow(broadcast(x), Half())[0];
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
