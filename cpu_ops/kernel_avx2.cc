// The kernel for AVX2 with FMA and F16C (Haswell and Zen, and later): vectors of 8 floats.

#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "chunk_kernel.h"

namespace apex {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kAccumulators = 8;  // of 16 registers; the rest hold operands
  static constexpr bool kDotsPairs = false;

  static APEX_INLINE F Zero() { return _mm256_setzero_ps(); }
  static APEX_INLINE F Set1(float value) { return _mm256_set1_ps(value); }
  static APEX_INLINE F Load(const float* p) { return _mm256_loadu_ps(p); }
  static APEX_INLINE F Load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static APEX_INLINE void Store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static APEX_INLINE F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static APEX_INLINE F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static APEX_INLINE F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static APEX_INLINE F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static APEX_INLINE F ScaleByPowerOf2(F a, F shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
  }

  static APEX_INLINE void Deinterleave(const BFloat* p, F& lo, F& hi) {
    Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), lo, hi);
  }
  static APEX_INLINE void Interleave(F& lo, F& hi) {
    const F a = _mm256_unpacklo_ps(lo, hi), b = _mm256_unpackhi_ps(lo, hi);
    lo = _mm256_permute2f128_ps(a, b, 0x20);
    hi = _mm256_permute2f128_ps(a, b, 0x31);
  }
  // A tail of a pair of vectors is 8 elements: head_dim is a multiple of 8.
  static APEX_INLINE void LoadPairTail(const BFloat* p, int, F& lo, F& hi) {
    Widen(_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), lo, hi);
  }
  template <class Element>
  static APEX_INLINE void LoadPairTail(const Element* p, int, F& lo, F& hi) {
    lo = Load(p);
    hi = Zero();
  }

 private:
  static APEX_INLINE void Widen(__m256i pairs, F& lo, F& hi) {
    lo = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    hi = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
  }
};

}  // namespace

extern constexpr ChunkFunctions kAvx2Functions = {
    {{AttendChunk<Avx2, float, kWideTile>, AttendChunk<Avx2, float, kNarrowTile>},
     {AttendChunk<Avx2, Half, kWideTile>, AttendChunk<Avx2, Half, kNarrowTile>},
     {AttendChunk<Avx2, BFloat, kWideTile>, AttendChunk<Avx2, BFloat, kNarrowTile>}},
    MergeChunks<Avx2>};

}  // namespace apex

#endif
