// The unit of work: one kv head of one request over at most kChunkTokens tokens.
//
// A chunk's result depends on nothing but its inputs and the instruction set, so a request's result
// does not depend on threads or batch: its chunks are cut at fixed tokens and merged in order.

#ifndef APEX_JAX_CPU_OPS_CHUNK_H_
#define APEX_JAX_CPU_OPS_CHUNK_H_

#include <cstdint>

#include "dtypes.h"
#include "layout.h"

namespace apex {

// Long enough that a chunk's start-up and merge vanish beside its 256 KiB (bf16, head_dim 128),
// short enough that its scores (2 KiB a query head) stay in L1 and two threads share one request of
// 1k tokens.
inline constexpr int kChunkTokens = 512;
inline constexpr int kMaxChunkTiles = kChunkTokens / kNarrowTile;
// Tiles that may be prefetched beyond the chunk's own: the widest block of tiles read side by side.
inline constexpr int kMaxBlockTiles = 8;

// What the kernel's buffers hold.
inline constexpr int kMaxHeadDim = 1024;

// Rows of partial sums are whole vectors of every instruction set, in pairs.
constexpr int64_t PaddedHeadDim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

struct Chunk {
  const void* q_gh;  // the queries that share this kv head, adjacent rows of head_dim
  DType q_dtype;
  int group;
  int head_dim;
  int num_tokens;  // 1 to kChunkTokens
  float scale;     // of the scores, with log2(e) multiplied in: the softmax is taken to the base 2

  // Tiles in the order in which they are read: keys, then values (num_tiles each), then
  // kMaxBlockTiles of whatever is read next. The last are prefetched and never used.
  const char* const* tiles;
  int num_tiles;

  // Results, in float32: per query the maximum score (base 2), the sum of weights relative to it,
  // and the sum of values under those weights (rows of PaddedHeadDim).
  float* max_g;
  float* sum_g;
  float* weighted_gh;
};

// The chunks of one kv head of one request, put together in their order.
struct Merge {
  int num_chunks;
  int group;
  int head_dim;
  // The chunks' results; the same query's in the next chunk lies chunk_stride queries behind.
  const float* max_g;
  const float* sum_g;
  const float* weighted_gh;
  int64_t chunk_stride;

  void* out_gh;
  DType out_dtype;
  float* lse_g;  // log-sum-exp of the scores, natural
};

using AttendFunction = void (*)(const Chunk&);

// A function for each pool dtype, in the order of DType, and for tiles of 16 and of 8.
struct ChunkFunctions {
  AttendFunction attend[3][2];
  void (*merge)(const Merge&);
};

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_CHUNK_H_
