// CPUID and XGETBV. A feature counts only when the CPU has it AND the operating system saves the
// registers it uses: a kernel booted without AVX-512 state (XCR0) faults on the first zmm
// instruction although CPUID lists it. Built with no ISA flags.
// Source: Intel SDM volume 1, sections 13.2 and 15.2-15.4; volume 2A, CPUID leaves 1 and 7.
#include "cpu_features.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace gptk {

#if defined(__x86_64__) || defined(__i386__)

namespace {

unsigned long long read_xcr0() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

bool all(unsigned word, unsigned bits) { return (word & bits) == bits; }

}  // namespace

CpuFeatures cpu_features() {
  CpuFeatures has;
  unsigned a, b, c, d, b7, c7, d7;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !all(c, bit_OSXSAVE | bit_AVX)) return has;
  const unsigned long long xcr0 = read_xcr0();
  const bool os_ymm = (xcr0 & 0x06) == 0x06;  // SSE and AVX state
  const bool os_zmm = (xcr0 & 0xe6) == 0xe6;  // and opmask, upper zmm halves, zmm16-31
  if (!os_ymm || !all(c, bit_FMA | bit_F16C)) return has;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return has;
  has.avx2 = all(b7, bit_AVX2 | bit_BMI2);
  const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  has.avx512 = has.avx2 && os_zmm && all(b7, avx512);
  const unsigned avx512_bf16 = 1u << 5;  // leaf 7, subleaf 1, eax
  has.avx512_bf16 = has.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && all(a, avx512_bf16);
  return has;
}

#else

CpuFeatures cpu_features() { return {}; }

#endif

}  // namespace gptk
