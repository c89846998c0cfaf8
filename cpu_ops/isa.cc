#include "isa.h"

#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace apex {
namespace {

// Functions of `base`, and of `narrow` for the tiles that `base` has none for.
[[maybe_unused]] ChunkFunctions WithNarrowTiles(ChunkFunctions base, const ChunkFunctions& narrow) {
  for (int dtype = 0; dtype < 3; ++dtype) base.attend[dtype][1] = narrow.attend[dtype][1];
  return base;
}

#if defined(__x86_64__)
// Clang's __builtin_cpu_supports does not know this name. AVX2's check covers the operating
// system's part.
bool HasF16C() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

std::vector<Isa> DetectIsas() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16C();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2 && has_avx512) {
    const ChunkFunctions functions = WithNarrowTiles(kAvx512Functions, kAvx2Functions);
    isas.push_back({"avx512", functions});
    if (__builtin_cpu_supports("avx512bf16")) {
      ChunkFunctions with_bf16 = functions;
      with_bf16.attend[static_cast<int>(DType::kBFloat16)][0] = kAvx512Bf16Attend;
      // AMD's cores start a vdpbf16ps every cycle, Intel's every other one: no faster than FMAs.
      isas.insert(__builtin_cpu_is("amd") ? isas.begin() : isas.end(), {"avx512_bf16", with_bf16});
    }
  }
  if (has_avx2) isas.push_back({"avx2", kAvx2Functions});
#elif defined(__aarch64__)
  isas.push_back({"neon", kNeonFunctions});
#endif
  isas.push_back({"portable", kPortableFunctions});
  return isas;
}

const std::vector<Isa>& Isas() {
  static const std::vector<Isa> isas = DetectIsas();
  return isas;
}

}  // namespace

const Isa* FindIsa(const std::string& name) {
  for (const Isa& isa : Isas()) {
    if (name.empty() || name == isa.name) return &isa;
  }
  return nullptr;
}

std::string SupportedIsas() {
  std::string names;
  for (const Isa& isa : Isas()) names += (names.empty() ? "" : " ") + std::string(isa.name);
  return names;
}

}  // namespace apex
