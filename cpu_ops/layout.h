// Where an element lies in the KV pool of one layer.
//
// The pool is [page, kv head, K or V, page_size * head_dim], contiguous: all that one kv head needs
// of a page is one run of memory, keys before values. Either half is a sequence of tiles of 16
// tokens (8 where the page size is no multiple of 16), each a run of tile * head_dim elements:
//
//   values  [token, dim]: a token's weight multiplies a row;
//   keys    [dim, token]: tokens lie in SIMD lanes, so that a score needs no sum across lanes. In
//   bfloat16
//           two dims share a lane, [dim / 2, token, 2]: one shift and one mask widen both.
//
// The layout does not depend on the instruction set, so a pool may be read by any of them.

#ifndef APEX_JAX_CPU_OPS_LAYOUT_H_
#define APEX_JAX_CPU_OPS_LAYOUT_H_

#include <cstdint>

#include "dtypes.h"

namespace apex {

inline constexpr int kWideTile = 16;
inline constexpr int kNarrowTile = 8;

struct PoolShape {
  int64_t num_pages;
  int64_t num_kv_heads;
  int64_t page_size;  // tokens; a multiple of 8
  int64_t head_dim;   // a multiple of 8
  DType dtype;

  int tile() const { return page_size % kWideTile == 0 ? kWideTile : kNarrowTile; }
  int64_t tile_bytes() const { return tile() * head_dim * SizeOf(dtype); }
  int64_t tiles_per_page() const { return page_size / tile(); }

  // Bytes of the keys, or of the values, of one kv head of a page.
  int64_t half_bytes() const { return page_size * head_dim * SizeOf(dtype); }
  int64_t page_bytes() const { return num_kv_heads * 2 * half_bytes(); }

  // Where the keys of (page, kv head) begin; its values lie half_bytes() behind them.
  int64_t Offset(int64_t page, int64_t kv_head) const {
    return page * page_bytes() + kv_head * 2 * half_bytes();
  }
};

// Index of (token, dim) in a tile of keys.
template <class Element>
inline int64_t KeyIndex(int64_t token, int64_t dim, int64_t tile) {
  return dim * tile + token;
}

template <>
inline int64_t KeyIndex<BFloat>(int64_t token, int64_t dim, int64_t tile) {
  return dim / 2 * 2 * tile + token * 2 + dim % 2;
}

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_LAYOUT_H_
