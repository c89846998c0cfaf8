// The SIMD type of AVX-512 (Skylake server and later), for the translation units built with it.

#ifndef APEX_JAX_CPU_OPS_SIMD_AVX512_H_
#define APEX_JAX_CPU_OPS_SIMD_AVX512_H_

#include <immintrin.h>

#include "chunk_kernel.h"

namespace apex {
namespace {  // each translation unit has its own: their flags differ

struct Avx512 {
  using F = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kAccumulators = 16;  // of 32 registers; the rest hold operands
  static constexpr bool kDotsPairs = false;

  static APEX_INLINE F Zero() { return _mm512_setzero_ps(); }
  static APEX_INLINE F Set1(float value) { return _mm512_set1_ps(value); }
  static APEX_INLINE F Load(const float* p) { return _mm512_loadu_ps(p); }
  static APEX_INLINE F Load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static APEX_INLINE void Store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static APEX_INLINE F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static APEX_INLINE F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static APEX_INLINE F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static APEX_INLINE F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static APEX_INLINE F ScaleByPowerOf2(F a, F shifted) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), exponent));
  }

  static APEX_INLINE void Deinterleave(const BFloat* p, F& lo, F& hi) {
    Widen(_mm512_loadu_si512(p), lo, hi);
  }
  static APEX_INLINE void Interleave(F& lo, F& hi) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const F a = _mm512_permutex2var_ps(lo, first, hi);
    hi = _mm512_permutex2var_ps(lo, second, hi);
    lo = a;
  }
  static APEX_INLINE void LoadPairTail(const BFloat* p, int count, F& lo, F& hi) {
    Widen(_mm512_maskz_loadu_epi32(FirstLanes(count / 2), p), lo, hi);
  }
  static APEX_INLINE void LoadPairTail(const Half* p, int count, F& lo, F& hi) {
    const __m512i both = _mm512_maskz_loadu_epi32(FirstLanes(count / 2), p);
    lo = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
    hi = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
  }
  static APEX_INLINE void LoadPairTail(const float* p, int count, F& lo, F& hi) {
    lo = _mm512_maskz_loadu_ps(FirstLanes(count < kLanes ? count : kLanes), p);
    hi = _mm512_maskz_loadu_ps(FirstLanes(count < kLanes ? 0 : count - kLanes), p + kLanes);
  }

 private:
  static APEX_INLINE __mmask16 FirstLanes(int count) {
    return static_cast<__mmask16>((1u << count) - 1);
  }
  static APEX_INLINE void Widen(__m512i pairs, F& lo, F& hi) {
    lo = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    hi = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }
};

}  // namespace
}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_SIMD_AVX512_H_
