// The kernel for AVX-512 with BF16 instructions: scores of bfloat16 queries over a bfloat16 pool by
// vdpbf16ps, which multiplies two dims at once and needs no widening; all else as in AVX-512.
//
// Products of bfloat16 are exact in float32, so scores are as good as with FMAs, but for subnormal
// elements, which count as zero. Weights keep their float32: the values are summed as elsewhere.
// Which of the two kernels is faster depends on the CPU; isa.cc chooses.

#include "isa.h"

#if defined(__x86_64__)

#include "simd_avx512.h"

namespace apex {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool kDotsPairs = true;

  static APEX_INLINE F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static APEX_INLINE F LoadPairs(const BFloat* p) {
    return _mm512_castsi512_ps(_mm512_loadu_si512(p));
  }
  static APEX_INLINE F DotPairs(F a, F b, F c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace

extern constexpr AttendFunction kAvx512Bf16Attend = AttendChunk<Avx512Bf16, BFloat, kWideTile>;

}  // namespace apex

#endif
