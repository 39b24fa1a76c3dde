// What this CPU, and the operating system's saving of its registers, allow.
#pragma once

namespace gptk {

struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA, F16C, BMI2
  bool avx512 = false;       // the above and AVX-512 F, BW, DQ, VL
  bool avx512_bf16 = false;  // the above and AVX512_BF16
};

CpuFeatures cpu_features();

}  // namespace gptk
