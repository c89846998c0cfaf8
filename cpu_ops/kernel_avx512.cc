// The kernel for AVX-512: tiles of 16 tokens, one vector each.
//
// FP16 instructions are left alone on purpose: they accumulate in 11 bits. One shift and one mask
// widen 32 bfloat16 values, one instruction 16 float16 values.

#include "isa.h"

#if defined(__x86_64__)

#include "simd_avx512.h"

namespace apex {

// Tiles of 8 tokens would leave half a vector empty; AVX2 takes them.
extern constexpr ChunkFunctions kAvx512Functions = {
    {{AttendChunk<Avx512, float, kWideTile>, nullptr},
     {AttendChunk<Avx512, Half, kWideTile>, nullptr},
     {AttendChunk<Avx512, BFloat, kWideTile>, nullptr}},
    MergeChunks<Avx512>};

}  // namespace apex

#endif
