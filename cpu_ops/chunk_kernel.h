// The kernel, written once over a SIMD type and compiled once per instruction set.
//
// A simd type `S` has: F, a vector of kLanes floats; kAccumulators, how many of them stay in
// registers through an inner loop; Zero, Set1, Load, Store, Add, Sub, Fma(a, b, c) = a * b +
// c, Max(a, b) that returns b where either is NaN, ScaleByPowerOf2; Load from float and Half;
// Deinterleave(p, lo, hi) of 2 * kLanes BFloats into even and odd elements; LoadPairTail for rows
// that end within a pair of vectors (only where 2 * kLanes > 8); and where kDotsPairs: Mul,
// LoadPairs of 2 * kLanes BFloats as they are, and DotPairs(a, b, c) of two such, a lane of which is
// c + a[even] * b[even] + a[odd] * b[odd]. This file includes nothing of an
// instruction set's own, and every function here is a template on S: the translation units, built
// with different flags, share no code of it.

#ifndef APEX_JAX_CPU_OPS_CHUNK_KERNEL_H_
#define APEX_JAX_CPU_OPS_CHUNK_KERNEL_H_

#include <cstring>
#include <type_traits>

#include "chunk.h"

#if defined(__clang__)
#define APEX_UNROLL _Pragma("clang loop unroll(full)")
#else
#define APEX_UNROLL _Pragma("GCC unroll 16")
#endif
#define APEX_INLINE inline __attribute__((always_inline))

namespace apex {

inline constexpr int kCacheLine = 64;

constexpr int AtLeast1(int value) { return value < 1 ? 1 : value; }
constexpr int AtMost(int value, int limit) { return value < limit ? value : limit; }

// 2^x for x <= 0, to 2 units in the last place; below 2^-126 it stays there, which no sum that
// holds a weight of 1 can see. NaN stays NaN.
template <class S>
APEX_INLINE typename S::F Exp2(typename S::F x) {
  using F = typename S::F;
  x = S::Max(S::Set1(-126.0f), x);
  // 1.5 * 2^23 pushes the fraction out of the mantissa and leaves round(x) in its low bits.
  const F magic = S::Set1(12582912.0f);
  const F shifted = S::Add(x, magic);
  const F f = S::Sub(x, S::Sub(shifted, magic));
  // 2^f on [-1/2, 1/2], interpolated at the Chebyshev nodes: relative error 2.5e-9 before rounding.
  F p = S::Set1(0.00015461444724808513f);
  p = S::Fma(p, f, S::Set1(0.0013400428177711937f));
  p = S::Fma(p, f, S::Set1(0.00961805667843204f));
  p = S::Fma(p, f, S::Set1(0.05550327226669895f));
  p = S::Fma(p, f, S::Set1(0.24022650922289554f));
  p = S::Fma(p, f, S::Set1(0.6931472067028329f));
  p = S::Fma(p, f, S::Set1(1.0f));
  return S::Add(S::ScaleByPowerOf2(p, shifted), S::Sub(x, x));
}

template <class Element>
inline constexpr bool kSharesLanes = std::is_same_v<Element, BFloat>;

// Two dims of the tokens in lanes: vector v of the row of keys that holds dims (2d, 2d + 1).
template <class S, int kTile, class Element>
APEX_INLINE void LoadKeys(const Element* row, int v, typename S::F& lo, typename S::F& hi) {
  if constexpr (kSharesLanes<Element>) {
    S::Deinterleave(row + 2 * v * S::kLanes, lo, hi);
  } else {
    lo = S::Load(row + v * S::kLanes);
    hi = S::Load(row + kTile + v * S::kLanes);
  }
}

// 2 * kLanes dims of one token's values: "pair order", even before odd dims where they share lanes.
template <class S, class Element>
APEX_INLINE void LoadValues(const Element* row, typename S::F& lo, typename S::F& hi) {
  if constexpr (kSharesLanes<Element>) {
    S::Deinterleave(row, lo, hi);
  } else {
    lo = S::Load(row);
    hi = S::Load(row + S::kLanes);
  }
}

template <class S, class Element>
APEX_INLINE void UndoPairOrder(const float* in, int padded_dims, float* out) {
  for (int d = 0; d < padded_dims; d += 2 * S::kLanes) {
    typename S::F lo = S::Load(in + d), hi = S::Load(in + d + S::kLanes);
    if constexpr (kSharesLanes<Element>) S::Interleave(lo, hi);
    S::Store(out + d, lo);
    S::Store(out + d + S::kLanes, hi);
  }
}

template <int kBytes>
APEX_INLINE void PrefetchToL2(const char* address) {
  APEX_UNROLL
  for (int byte = 0; byte < kBytes; byte += kCacheLine) {
    __builtin_prefetch(address + byte, 0, 2);
  }
}

// How far ahead of the tiles that are computed others are prefetched, however many are read side by
// side: AVX2 reads keys tile by tile, and one tile ahead is too few.
APEX_INLINE int TilesAhead(const Chunk& chunk) {
  return AtMost(kMaxBlockTiles, chunk.num_tiles);
}

template <class S, class Element, int kTile, int kHeads>
struct HeadsKernel {
  using F = typename S::F;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kPair = 2 * kLanes;
  static constexpr int kVectors = kTile / kLanes;  // of a tile's tokens
  // Tokens whose scores are accumulated in one go, in vectors of a tile, and tiles read side by
  // side. Several tiles at once keep more lines in flight than one stream of the hardware
  // prefetcher does, and give the two FMA ports the 8 independent sums that their 4 cycles of
  // latency ask for.
  static constexpr int kSlice = AtMost(kVectors, AtLeast1(S::kAccumulators / kHeads));
  static constexpr int kKeyTiles =
      AtMost(kMaxBlockTiles, AtLeast1(S::kAccumulators / (kHeads * kSlice)));
  // Pairs of vectors of dims that the values' sums keep in registers, and tiles read side by side.
  static constexpr int kDimPairs = AtMost(4, AtLeast1(S::kAccumulators / (2 * kHeads)));
  // Of tiles of values eight are faster than four, but where their weights are those of eight heads.
  static constexpr int kValueTiles = kHeads < 8 ? kMaxBlockTiles : 4;

  // Rows of queries start in different sets of the L1 cache.
  static constexpr int kQueryStride = kMaxHeadDim + 16;

  // Whether scores can come from bfloat16 queries and keys as they are, two dims at once.
  static constexpr bool kCanDot = S::kDotsPairs && std::is_same_v<Element, BFloat>;

  // In float32; or, where dotted, their bfloat16 bits, two dims to a float.
  alignas(kCacheLine) float q_gh[kHeads * kQueryStride];
  alignas(kCacheLine) float weights_gs[kHeads * kChunkTokens];
  alignas(kCacheLine) float sums_gh[kHeads * kMaxHeadDim];  // dims in pair order

  void Run(const Chunk& chunk, int head) {
    const int h = chunk.head_dim;
    const int padded_dims = (h + kPair - 1) / kPair * kPair;

    // Pass 1: scores = scale * einsum("gh,sh->gs", q, k), the scale taken into q where q is float32.
    int tile = 0;
    if (kCanDot && chunk.q_dtype == DType::kBFloat16) {
      const auto* q = static_cast<const BFloat*>(chunk.q_gh) + int64_t{head} * h;
      for (int g = 0; g < kHeads; ++g) {
        std::memcpy(q_gh + g * kQueryStride, q + g * h, h * sizeof *q);
      }
      QDotK<kKeyTiles, kCanDot>(chunk, tile);
    } else {
      Dispatch(chunk.q_dtype, [&](auto like) {
        const auto* q = static_cast<const decltype(like)*>(chunk.q_gh) + int64_t{head} * h;
        for (int g = 0; g < kHeads; ++g) {
          for (int d = 0; d < h; ++d) {
            q_gh[g * kQueryStride + d] = ToFloat(q[g * h + d]) * chunk.scale;
          }
        }
      });
      QDotK<kKeyTiles, false>(chunk, tile);
    }

    // Pass 2: weights = 2^(scores - max). Slots after the last token may hold anything.
    for (int g = 0; g < kHeads; ++g) {
      float* weights_s = weights_gs + g * kChunkTokens;
      for (int s = chunk.num_tokens; s < chunk.num_tiles * kTile; ++s) {
        weights_s[s] = -__builtin_inff();
      }
      Softmax(weights_s, chunk.num_tiles * kTile, chunk.max_g + head + g, chunk.sum_g + head + g);
    }

    // Pass 3: weighted = einsum("gs,sh->gh", weights, v), over the tokens there are.
    for (int i = 0; i < kHeads * padded_dims; ++i) sums_gh[i] = 0;
    const int num_full_tiles = chunk.num_tokens / kTile;
    tile = 0;
    for (; tile + kValueTiles <= num_full_tiles; tile += kValueTiles) {
      WeightedSumV<kValueTiles>(chunk, tile, kTile, padded_dims);
    }
    for (; tile < num_full_tiles; ++tile) WeightedSumV<1>(chunk, tile, kTile, padded_dims);
    if (chunk.num_tokens % kTile != 0) {
      WeightedSumV<1>(chunk, tile, chunk.num_tokens % kTile, padded_dims);
    }
    for (int g = 0; g < kHeads; ++g) {
      UndoPairOrder<S, Element>(sums_gh + g * padded_dims, padded_dims,
                                chunk.weighted_gh + int64_t{head + g} * PaddedHeadDim(h));
    }
  }

  // Scores of the tiles from `tile` on, kTiles at a time while there are so many, then half as
  // many.
  template <int kTiles, bool kDots>
  APEX_INLINE void QDotK(const Chunk& chunk, int& tile) {
    for (; tile + kTiles <= chunk.num_tiles; tile += kTiles) {
      APEX_UNROLL
      for (int slice = 0; slice < kVectors; slice += kSlice) {
        QDotKBlock<kTiles, kDots>(chunk, tile, slice);
      }
    }
    if constexpr (kTiles > 1) QDotK<kTiles / 2, kDots>(chunk, tile);
  }

  template <int kTiles, bool kDots>
  __attribute__((noinline)) void QDotKBlock(const Chunk& chunk, int tile, int slice) {
    constexpr int kRowBytes = 2 * kTile * sizeof(Element);
    // Tiles whose keys share one broadcast of a query's element, where registers hold so many.
    constexpr int kTogether = S::kAccumulators >= 16 ? kTiles : 1;
    const int h = chunk.head_dim;
    const char* rows[kTiles];
    const char* next_rows[kTiles];
    F scores[kTiles][kSlice][kHeads];
    APEX_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      rows[t] = chunk.tiles[tile + t];
      next_rows[t] = chunk.tiles[tile + TilesAhead(chunk) + t];
      APEX_UNROLL
      for (int v = 0; v < kSlice; ++v) {
        APEX_UNROLL
        for (int g = 0; g < kHeads; ++g) scores[t][v][g] = S::Zero();
      }
    }
    for (int d = 0; d < h / 2; ++d) {
      const int64_t row = d * int64_t{kRowBytes};
      APEX_UNROLL
      for (int first = 0; first < kTiles; first += kTogether) {
        APEX_UNROLL
        for (int t = first; t < first + kTogether; ++t) {
          if (slice == 0) PrefetchToL2<kRowBytes>(next_rows[t] + row);
        }
        if constexpr (kDots) {
          AddDots<kTogether>(rows + first, row, slice, d, scores + first);
        } else {
          AddProducts<kTogether>(rows + first, row, slice, d, scores + first);
        }
      }
    }
    if constexpr (kDots) {
      APEX_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        APEX_UNROLL
        for (int v = 0; v < kSlice; ++v) {
          APEX_UNROLL
          for (int g = 0; g < kHeads; ++g) {
            scores[t][v][g] = S::Mul(scores[t][v][g], S::Set1(chunk.scale));
          }
        }
      }
    }
    APEX_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      APEX_UNROLL
      for (int v = 0; v < kSlice; ++v) {
        APEX_UNROLL
        for (int g = 0; g < kHeads; ++g) {
          S::Store(weights_gs + g * kChunkTokens + (tile + t) * kTile + (slice + v) * kLanes,
                   scores[t][v][g]);
        }
      }
    }
  }

  // Adds the products of dims 2d and 2d + 1, which lie at `row` of each tile, to its scores.
  template <int kTiles>
  APEX_INLINE void AddProducts(const char* const* rows, int64_t row, int slice, int d,
                               F (*scores)[kSlice][kHeads]) {
    F lo[kTiles][kSlice], hi[kTiles][kSlice];
    APEX_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      APEX_UNROLL
      for (int v = 0; v < kSlice; ++v) {
        LoadKeys<S, kTile>(reinterpret_cast<const Element*>(rows[t] + row), slice + v, lo[t][v],
                           hi[t][v]);
      }
    }
    APEX_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      const F q_lo = S::Set1(q_gh[g * kQueryStride + 2 * d]);
      APEX_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        APEX_UNROLL
        for (int v = 0; v < kSlice; ++v) scores[t][v][g] = S::Fma(lo[t][v], q_lo, scores[t][v][g]);
      }
    }
    APEX_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      const F q_hi = S::Set1(q_gh[g * kQueryStride + 2 * d + 1]);
      APEX_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        APEX_UNROLL
        for (int v = 0; v < kSlice; ++v) scores[t][v][g] = S::Fma(hi[t][v], q_hi, scores[t][v][g]);
      }
    }
  }

  // The same, of bfloat16 pairs.
  template <int kTiles>
  APEX_INLINE void AddDots(const char* const* rows, int64_t row, int slice, int d,
                           F (*scores)[kSlice][kHeads]) {
    F keys[kTiles][kSlice];
    APEX_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      APEX_UNROLL
      for (int v = 0; v < kSlice; ++v) {
        const auto* pairs = reinterpret_cast<const Element*>(rows[t] + row);
        keys[t][v] = S::LoadPairs(pairs + 2 * (slice + v) * kLanes);
      }
    }
    APEX_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      const F q_pair = S::Set1(q_gh[g * kQueryStride + d]);
      APEX_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        APEX_UNROLL
        for (int v = 0; v < kSlice; ++v) {
          scores[t][v][g] = S::DotPairs(keys[t][v], q_pair, scores[t][v][g]);
        }
      }
    }
  }

  static void Softmax(float* scores_s, int num_scores, float* max_score, float* sum_weights) {
    alignas(kCacheLine) float lanes[kLanes];
    F max = S::Load(scores_s);
    for (int s = kLanes; s < num_scores; s += kLanes) max = S::Max(max, S::Load(scores_s + s));
    S::Store(lanes, max);
    *max_score = lanes[0];
    for (int i = 1; i < kLanes; ++i) {
      if (lanes[i] > *max_score) *max_score = lanes[i];
    }
    F sum = S::Zero();
    for (int s = 0; s < num_scores; s += kLanes) {
      const F weight = Exp2<S>(S::Sub(S::Load(scores_s + s), S::Set1(*max_score)));
      S::Store(scores_s + s, weight);
      sum = S::Add(sum, weight);
    }
    S::Store(lanes, sum);
    *sum_weights = 0;
    for (int i = 0; i < kLanes; ++i) *sum_weights += lanes[i];
  }

  // Adds kTiles tiles of values, num_rows tokens of each, to the sums of every dim.
  template <int kTiles>
  APEX_INLINE void WeightedSumV(const Chunk& chunk, int tile, int num_rows, int padded_dims) {
    const int full_dims = chunk.head_dim / kPair * kPair;
    int dim = 0;
    for (; dim + kDimPairs * kPair <= full_dims; dim += kDimPairs * kPair) {
      WeightedSumVBlock<kTiles, kDimPairs, false>(chunk, tile, num_rows, dim, padded_dims);
    }
    for (; dim < full_dims; dim += kPair) {
      WeightedSumVBlock<kTiles, 1, false>(chunk, tile, num_rows, dim, padded_dims);
    }
    if constexpr (kPair > 8) {
      if (dim < chunk.head_dim) {
        WeightedSumVBlock<kTiles, 1, true>(chunk, tile, num_rows, dim, padded_dims);
      }
    }
  }

  template <int kTiles, int kPairs, bool kTail>
  __attribute__((noinline)) void WeightedSumVBlock(const Chunk& chunk, int tile, int num_rows,
                                                   int dim, int padded_dims) {
    const int h = chunk.head_dim;
    constexpr int kPartBytes = kPairs * kPair * sizeof(Element);
    const int64_t row_bytes = h * int64_t{sizeof(Element)};
    const char* rows[kTiles];
    // The next tiles are prefetched from end to end over all dims, whatever part of a row is summed
    // here.
    const char* next_tiles[kTiles];
    APEX_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int64_t dim_bytes = dim * int64_t{sizeof(Element)};
      rows[t] = chunk.tiles[chunk.num_tiles + tile + t] + dim_bytes;
      next_tiles[t] =
          chunk.tiles[chunk.num_tiles + tile + TilesAhead(chunk) + t] + dim_bytes * kTile;
    }
    F sums[kHeads][2 * kPairs];
    APEX_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      APEX_UNROLL
      for (int v = 0; v < 2 * kPairs; ++v) {
        sums[g][v] = S::Load(sums_gh + g * padded_dims + dim + v * kLanes);
      }
    }
    for (int r = 0; r < num_rows; ++r) {
      APEX_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        const Element* row = reinterpret_cast<const Element*>(rows[t] + r * row_bytes);
        const float* weights_g = weights_gs + (tile + t) * kTile + r;
        PrefetchToL2<kPartBytes>(next_tiles[t] + r * kPartBytes);
        APEX_UNROLL
        for (int p = 0; p < kPairs; ++p) {
          F lo, hi;
          if constexpr (kTail) {
            S::LoadPairTail(row, h - dim, lo, hi);
          } else {
            LoadValues<S, Element>(row + p * kPair, lo, hi);
          }
          APEX_UNROLL
          for (int g = 0; g < kHeads; ++g) {
            const F weight = S::Set1(weights_g[g * kChunkTokens]);
            sums[g][2 * p] = S::Fma(lo, weight, sums[g][2 * p]);
            sums[g][2 * p + 1] = S::Fma(hi, weight, sums[g][2 * p + 1]);
          }
        }
      }
    }
    APEX_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      APEX_UNROLL
      for (int v = 0; v < 2 * kPairs; ++v) {
        S::Store(sums_gh + g * padded_dims + dim + v * kLanes, sums[g][v]);
      }
    }
  }
};

// Out of line, so that only the buffers of the group's size are on the stack.
template <class S, class Element, int kTile, int kHeads>
__attribute__((noinline)) int AttendHeads(const Chunk& chunk, int head) {
  HeadsKernel<S, Element, kTile, kHeads> kernel;
  kernel.Run(chunk, head);
  return kHeads;
}

template <class S>
inline constexpr int kMaxHeads = S::kAccumulators >= 16 ? 8 : 4;

// The heads of a group, 8 at a time where the sums of so many fit into registers, then 4, 3, 2
// or 1. All but the first few read the chunk again, from the L2 cache.
template <class S, class Element, int kTile>
void AttendChunk(const Chunk& chunk) {
  int head = 0;
  while (head < chunk.group) {
    const int left = chunk.group - head;
    if (left >= 8 && kMaxHeads<S> == 8) {
      head += AttendHeads<S, Element, kTile, kMaxHeads<S>>(chunk, head);
    } else if (left >= 4) {
      head += AttendHeads<S, Element, kTile, 4>(chunk, head);
    } else if (left == 3) {
      head += AttendHeads<S, Element, kTile, 3>(chunk, head);
    } else if (left == 2) {
      head += AttendHeads<S, Element, kTile, 2>(chunk, head);
    } else {
      head += AttendHeads<S, Element, kTile, 1>(chunk, head);
    }
  }
}

// out = sum over chunks of weighted * 2^(max - largest max), divided by the same of the sums.
template <class S>
void MergeChunks(const Merge& merge) {
  alignas(kCacheLine) float lanes[S::kLanes];
  alignas(kCacheLine) float merged_h[kMaxHeadDim];
  const int h = merge.head_dim;
  for (int g = 0; g < merge.group; ++g) {
    const float* max_c = merge.max_g + g;
    float max = max_c[0];
    for (int c = 1; c < merge.num_chunks; ++c) {
      if (max_c[c * merge.chunk_stride] > max) max = max_c[c * merge.chunk_stride];
    }
    float sum = 0;
    for (int d = 0; d < h; ++d) merged_h[d] = 0;
    for (int c = 0; c < merge.num_chunks; ++c) {
      const int64_t query = c * merge.chunk_stride + g;
      S::Store(lanes, Exp2<S>(S::Set1(merge.max_g[query] - max)));
      const float weight = lanes[0];
      const float* weighted_h = merge.weighted_gh + query * PaddedHeadDim(h);
      sum += weight * merge.sum_g[query];
      for (int d = 0; d < h; ++d) merged_h[d] += weight * weighted_h[d];
    }
    Dispatch(merge.out_dtype, [&](auto like) {
      auto* out_h = static_cast<decltype(like)*>(merge.out_gh) + int64_t{g} * h;
      for (int d = 0; d < h; ++d) FromFloat(merged_h[d] / sum, out_h + d);
    });
    constexpr float kLn2 = 0.693147180559945f;
    merge.lse_g[g] = max * kLn2 + __builtin_logf(sum);
  }
}

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_CHUNK_KERNEL_H_
