// One table of kernels per instruction set. The names of the sets exist once, in GPTK_ISAS.
#pragma once

#include "gptk.h"

// X(isa, whether this CPU can run it). CMake defines GPTK_HAVE_<isa> for those that the compiler
// could build.
#ifdef GPTK_HAVE_avx2
#define GPTK_ISA_AVX2(X) X(avx2, cpu.avx2)
#else
#define GPTK_ISA_AVX2(X)
#endif
#ifdef GPTK_HAVE_avx512
#define GPTK_ISA_AVX512(X) X(avx512, cpu.avx512)
#else
#define GPTK_ISA_AVX512(X)
#endif
#ifdef GPTK_HAVE_avx512_bf16
#define GPTK_ISA_AVX512_BF16(X) X(avx512_bf16, cpu.avx512_bf16)
#else
#define GPTK_ISA_AVX512_BF16(X)
#endif
#define GPTK_ISAS(X) X(baseline, true) GPTK_ISA_AVX2(X) GPTK_ISA_AVX512(X) GPTK_ISA_AVX512_BF16(X)

namespace gptk {

struct Kernels {
  const char* isa;
#define GPTK_FIELD(op) void (*op)(const gptk_##op##_args&);
  GPTK_OPS(GPTK_FIELD)
#undef GPTK_FIELD
};

#define GPTK_DECLARE_KERNEL(op) void op(const gptk_##op##_args&);
#define GPTK_DECLARE_ISA(isa, runs) \
  namespace isa {                   \
  GPTK_OPS(GPTK_DECLARE_KERNEL)     \
  }
GPTK_ISAS(GPTK_DECLARE_ISA)
#undef GPTK_DECLARE_ISA
#undef GPTK_DECLARE_KERNEL

}  // namespace gptk
