// Which of a kernel's instruction sets to call. Not for the kernels' own files, as it holds functions.

#pragma once

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <string>

// For a plain loop: compiled for several instruction sets, one of which is chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__)
#define BEVT_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define BEVT_VECTORISED
#endif

namespace bevt_kernels {

enum class Instructions { kBaseline, kAvx2, kAvx512 };

// As torch chooses its own kernels: ATEN_CPU_CAPABILITY=default, avx2 or avx512 overrules what the machine has.
inline Instructions instructions() {
#ifdef BEVT_X86_KERNELS
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) {
    TORCH_CHECK(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
                "this processor has no AVX-512 (F, BW, VL, DQ): unset ATEN_CPU_CAPABILITY");
    return Instructions::kAvx512;
  }
  if (capability == "AVX2") {
    TORCH_CHECK(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
                "this processor has no AVX2 with FMA: unset ATEN_CPU_CAPABILITY");
    return Instructions::kAvx2;
  }
#endif
  return Instructions::kBaseline;
}

// The table of that name for the chosen instruction set; on other machines than x86-64 there is only the baseline's.
#ifdef BEVT_X86_KERNELS
#define BEVT_CHOOSE(table)                                 \
  (instructions() == Instructions::kAvx512 ? avx512::table \
   : instructions() == Instructions::kAvx2 ? avx2::table   \
                                           : baseline::table)
#else
#define BEVT_CHOOSE(table) (baseline::table)
#endif

}  // namespace bevt_kernels
