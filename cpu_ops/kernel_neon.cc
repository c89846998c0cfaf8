// The kernel for 64-bit Arm, whose every CPU has these instructions: vectors of 4 floats.

#include "isa.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "chunk_kernel.h"

namespace apex {
namespace {

struct Neon {
  using F = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kAccumulators = 16;  // of 32 registers; the rest hold operands
  static constexpr bool kDotsPairs = false;

  static APEX_INLINE F Zero() { return vdupq_n_f32(0); }
  static APEX_INLINE F Set1(float value) { return vdupq_n_f32(value); }
  static APEX_INLINE F Load(const float* p) { return vld1q_f32(p); }
  static APEX_INLINE F Load(const Half* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
  }
  static APEX_INLINE void Store(float* p, F a) { vst1q_f32(p, a); }
  static APEX_INLINE F Add(F a, F b) { return vaddq_f32(a, b); }
  static APEX_INLINE F Sub(F a, F b) { return vsubq_f32(a, b); }
  static APEX_INLINE F Fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static APEX_INLINE F Max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static APEX_INLINE F ScaleByPowerOf2(F a, F shifted) {
    const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(a), exponent));
  }
  static APEX_INLINE void Deinterleave(const BFloat* p, F& lo, F& hi) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
    lo = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
    hi = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
  }
  static APEX_INLINE void Interleave(F& lo, F& hi) {
    const F a = vzip1q_f32(lo, hi);
    hi = vzip2q_f32(lo, hi);
    lo = a;
  }
};

}  // namespace

extern constexpr ChunkFunctions kNeonFunctions = {
    {{AttendChunk<Neon, float, kWideTile>, AttendChunk<Neon, float, kNarrowTile>},
     {AttendChunk<Neon, Half, kWideTile>, AttendChunk<Neon, Half, kNarrowTile>},
     {AttendChunk<Neon, BFloat, kWideTile>, AttendChunk<Neon, BFloat, kNarrowTile>}},
    MergeChunks<Neon>};

}  // namespace apex

#endif
