// The kernel for any CPU: vectors of 4 floats in the compilers' own vector types, which become the
// least instructions that the platform guarantees (SSE2 on x86-64), or scalar code where it
// guarantees none.

#include "chunk_kernel.h"
#include "isa.h"

namespace apex {
namespace {

struct Portable {
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kAccumulators = 8;
  static constexpr bool kDotsPairs = false;

  static APEX_INLINE F Zero() { return F{}; }
  static APEX_INLINE F Set1(float value) { return F{value, value, value, value}; }
  static APEX_INLINE F Load(const float* p) {
    F a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  // ToFloat of dtypes.h, in lanes.
  static APEX_INLINE F Load(const Half* p) {
    const U half = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    const U magnitude = (half & 0x7fffu) << 13;
    const U normal = reinterpret_cast<U>(reinterpret_cast<F>(magnitude) * Set1(0x1p112f));
    const U is_infinite = reinterpret_cast<U>(magnitude >= 0x0f800000u);
    return reinterpret_cast<F>(normal | (is_infinite & 0x7f800000u) | (half & 0x8000u) << 16);
  }
  static APEX_INLINE void Store(float* p, F a) { __builtin_memcpy(p, &a, sizeof a); }
  static APEX_INLINE F Add(F a, F b) { return a + b; }
  static APEX_INLINE F Sub(F a, F b) { return a - b; }
  static APEX_INLINE F Fma(F a, F b, F c) { return a * b + c; }
  static APEX_INLINE F Max(F a, F b) {
    const U a_is_greater = reinterpret_cast<U>(a > b);
    return reinterpret_cast<F>((reinterpret_cast<U>(a) & a_is_greater) |
                               (reinterpret_cast<U>(b) & ~a_is_greater));
  }
  static APEX_INLINE F ScaleByPowerOf2(F a, F shifted) {
    return reinterpret_cast<F>(reinterpret_cast<U>(a) + (reinterpret_cast<U>(shifted) << 23));
  }
  static APEX_INLINE void Deinterleave(const BFloat* p, F& lo, F& hi) {
    U pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    lo = reinterpret_cast<F>(pairs << 16);
    hi = reinterpret_cast<F>(pairs & 0xffff0000u);
  }
  static APEX_INLINE void Interleave(F& lo, F& hi) {
    const F a = {lo[0], hi[0], lo[1], hi[1]};
    hi = F{lo[2], hi[2], lo[3], hi[3]};
    lo = a;
  }
};

}  // namespace

extern constexpr ChunkFunctions kPortableFunctions = {
    {{AttendChunk<Portable, float, kWideTile>, AttendChunk<Portable, float, kNarrowTile>},
     {AttendChunk<Portable, Half, kWideTile>, AttendChunk<Portable, Half, kNarrowTile>},
     {AttendChunk<Portable, BFloat, kWideTile>, AttendChunk<Portable, BFloat, kNarrowTile>}},
    MergeChunks<Portable>};

}  // namespace apex
