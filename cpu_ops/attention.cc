#include "attention.h"

#include <algorithm>

namespace apex {
namespace {

int64_t NumChunks(int64_t num_tokens) { return (num_tokens + kChunkTokens - 1) / kChunkTokens; }

const char* At(const void* data, DType dtype, int64_t element) {
  return static_cast<const char*>(data) + element * SizeOf(dtype);
}

// Writes the addresses of the tiles of tokens [first_token, first_token + num_tokens) of one kv
// head: keys, then values num_tiles behind. first_token is a multiple of the tile.
void ListTiles(const Pool& pool, const int32_t* pages, int64_t kv_head, int64_t first_token,
               int num_tiles, const char** tiles) {
  const PoolShape& shape = pool.shape;
  const int64_t tiles_per_page = shape.tiles_per_page();
  const int64_t first_tile = first_token / shape.tile();
  int64_t page = first_tile / tiles_per_page;
  int64_t tile = first_tile % tiles_per_page;
  for (int i = 0; i < num_tiles; ++i) {
    tiles[i] = pool.data + shape.Offset(pages[page], kv_head) + tile * shape.tile_bytes();
    tiles[num_tiles + i] = tiles[i] + shape.half_bytes();
    if (++tile == tiles_per_page) {
      tile = 0;
      ++page;
    }
  }
}

template <class To, class From>
void Convert(From from, To* to) {
  FromFloat(ToFloat(from), to);
}

// The same type keeps its bits, those of NaNs too.
template <class Element>
void Convert(Element from, Element* to) {
  *to = from;
}

// Calls body(like_a, like_b) with values of both dtypes' C++ types.
template <class Body>
void Dispatch2(DType a, DType b, const Body& body) {
  Dispatch(a, [&](auto like_a) { Dispatch(b, [&](auto like_b) { body(like_a, like_b); }); });
}

}  // namespace

void HostAttention::Append(const Pool& pool, const HeadRows& k, const HeadRows& v,
                           const Tables& tables) {
  const PoolShape& shape = pool.shape;
  const int64_t h = shape.head_dim;
  threads_.Run(tables.num_rows * shape.num_kv_heads, [&](int64_t task) {
    const int64_t row = task / shape.num_kv_heads;
    const int64_t kv_head = task % shape.num_kv_heads;
    const int64_t token = tables.lengths_b[row] - 1;
    const int64_t slot = token % shape.page_size;
    const int32_t page = tables.pages(row)[token / shape.page_size];
    Dispatch2(shape.dtype, k.dtype, [&](auto like_pool, auto like_new) {
      using Element = decltype(like_pool);
      using New = decltype(like_new);
      char* half = pool.data + shape.Offset(page, kv_head);
      auto* keys = reinterpret_cast<Element*>(half) + slot / shape.tile() * shape.tile() * h;
      auto* values = reinterpret_cast<Element*>(half + shape.half_bytes()) + slot * h;
      const auto* new_k = static_cast<const New*>(k.data) + row * k.row_stride + kv_head * h;
      const auto* new_v = static_cast<const New*>(v.data) + row * v.row_stride + kv_head * h;
      for (int64_t d = 0; d < h; ++d) {
        Convert(new_k[d], keys + KeyIndex<Element>(slot % shape.tile(), d, shape.tile()));
        Convert(new_v[d], values + d);
      }
    });
  });
}

void HostAttention::Attend(const Pool& pool, const HeadRows& q, int64_t num_heads, float scale,
                           const Tables& tables, const AttendOutput& output) {
  constexpr float kLog2E = 1.44269504088896f;
  const PoolShape& shape = pool.shape;
  const int64_t h = shape.head_dim;
  const int64_t num_kv_heads = shape.num_kv_heads;
  const int64_t group = num_heads / num_kv_heads;
  std::lock_guard<std::mutex> turn(turn_);

  chunk_rows_.clear();
  first_chunks_.clear();
  for (int64_t row = 0; row < tables.num_rows; ++row) {
    first_chunks_.push_back(static_cast<int32_t>(chunk_rows_.size()));
    chunk_rows_.insert(chunk_rows_.end(), NumChunks(tables.lengths_b[row]),
                       static_cast<int32_t>(row));
  }
  const int64_t num_chunks = static_cast<int64_t>(chunk_rows_.size());
  max_.resize(std::max<size_t>(max_.size(), num_chunks * num_heads));
  sum_.resize(max_.size());
  weighted_.resize(std::max<size_t>(weighted_.size(), num_chunks * num_heads * PaddedHeadDim(h)));
  if (num_chunks_left_ < tables.num_rows * num_kv_heads) {
    num_chunks_left_ = tables.num_rows * num_kv_heads;
    chunks_left_ = std::make_unique<std::atomic<int32_t>[]>(num_chunks_left_);
  }
  for (int64_t row = 0; row < tables.num_rows; ++row) {
    const auto chunks = static_cast<int32_t>(NumChunks(tables.lengths_b[row]));
    for (int64_t kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
      chunks_left_[row * num_kv_heads + kv_head].store(chunks, std::memory_order_relaxed);
    }
  }

  // A task is (request, chunk, kv head), the last fastest: heads of a page are neighbours in
  // memory.
  const int64_t num_tasks = num_chunks * num_kv_heads;
  // Fills in where task's tokens begin and how many there are; returns its request.
  const auto locate = [&](int64_t task, int64_t& first_token, int64_t& num_tokens) {
    const int64_t row = chunk_rows_[task / num_kv_heads];
    first_token = (task / num_kv_heads - first_chunks_[row]) * kChunkTokens;
    num_tokens = std::min<int64_t>(kChunkTokens, tables.lengths_b[row] - first_token);
    return row;
  };
  threads_.Run(num_tasks, [&](int64_t task) {
    const int64_t kv_head = task % num_kv_heads;
    int64_t first_token, num_tokens;
    const int64_t row = locate(task, first_token, num_tokens);
    const int num_tiles = static_cast<int>((num_tokens + shape.tile() - 1) / shape.tile());
    const char* tiles[2 * kMaxChunkTiles + 2 * kMaxBlockTiles];
    ListTiles(pool, tables.pages(row), kv_head, first_token, num_tiles, tiles);

    // What comes next: with every thread claiming in order, most likely the task num_threads ahead.
    const char** next_tiles = tiles + 2 * num_tiles;
    const int64_t next_task = task + num_threads();
    int num_next = 0;
    if (next_task < num_tasks) {
      int64_t next_token, next_num_tokens;
      const int64_t next_row = locate(next_task, next_token, next_num_tokens);
      num_next = static_cast<int>(
          std::min<int64_t>(kMaxBlockTiles, (next_num_tokens + shape.tile() - 1) / shape.tile()));
      ListTiles(pool, tables.pages(next_row), next_task % num_kv_heads, next_token, num_next,
                next_tiles);
    }
    for (int i = num_next; i < kMaxBlockTiles; ++i) next_tiles[i] = tiles[2 * num_tiles - 1];

    const int64_t query = task / num_kv_heads * num_heads + kv_head * group;
    Chunk chunk;
    chunk.q_gh = At(q.data, q.dtype, row * q.row_stride + kv_head * group * h);
    chunk.q_dtype = q.dtype;
    chunk.group = static_cast<int>(group);
    chunk.head_dim = static_cast<int>(h);
    chunk.num_tokens = static_cast<int>(num_tokens);
    chunk.scale = scale * kLog2E;
    chunk.tiles = tiles;
    chunk.num_tiles = num_tiles;
    chunk.max_g = max_.data() + query;
    chunk.sum_g = sum_.data() + query;
    chunk.weighted_gh = weighted_.data() + query * PaddedHeadDim(h);
    isa_->Attend(shape, chunk);

    // Whoever finishes a head's last chunk merges them all, in their order.
    std::atomic<int32_t>& left = chunks_left_[row * num_kv_heads + kv_head];
    if (left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const int64_t first_query = int64_t{first_chunks_[row]} * num_heads + kv_head * group;
    const int64_t out_query = row * num_heads + kv_head * group;
    Merge merge;
    merge.num_chunks = static_cast<int>(NumChunks(tables.lengths_b[row]));
    merge.group = static_cast<int>(group);
    merge.head_dim = static_cast<int>(h);
    merge.max_g = max_.data() + first_query;
    merge.sum_g = sum_.data() + first_query;
    merge.weighted_gh = weighted_.data() + first_query * PaddedHeadDim(h);
    merge.chunk_stride = num_heads;
    merge.out_gh = static_cast<char*>(output.out_bnh) + out_query * h * SizeOf(q.dtype);
    merge.out_dtype = q.dtype;
    merge.lse_g = output.lse_bn + out_query;
    isa_->functions.merge(merge);
  });
}

void HostAttention::WritePages(const Pool& pool, const int32_t* page_ids, int64_t num_ids,
                               const void* pages, DType dtype) {
  const PoolShape& shape = pool.shape;
  const int64_t h = shape.head_dim, z = shape.page_size, tile = shape.tile();
  threads_.Run(num_ids * shape.num_kv_heads, [&](int64_t task) {
    char* half =
        pool.data + shape.Offset(page_ids[task / shape.num_kv_heads], task % shape.num_kv_heads);
    Dispatch2(shape.dtype, dtype, [&](auto like_pool, auto like_pages) {
      using Element = decltype(like_pool);
      const auto* k_zh = static_cast<const decltype(like_pages)*>(pages) + task * 2 * z * h;
      const auto* v_zh = k_zh + z * h;
      auto* keys = reinterpret_cast<Element*>(half);
      auto* values = reinterpret_cast<Element*>(half + shape.half_bytes());
      for (int64_t first = 0; first < z; first += tile) {
        for (int64_t d = 0; d < h; ++d) {
          for (int64_t t = 0; t < tile; ++t) {
            Convert(k_zh[(first + t) * h + d], keys + first * h + KeyIndex<Element>(t, d, tile));
          }
        }
      }
      for (int64_t i = 0; i < z * h; ++i) Convert(v_zh[i], values + i);
    });
  });
}

void HostAttention::ReadPages(const Pool& pool, const int32_t* page_ids, int64_t num_ids,
                              void* pages, DType dtype) {
  const PoolShape& shape = pool.shape;
  const int64_t h = shape.head_dim, z = shape.page_size, tile = shape.tile();
  threads_.Run(num_ids * shape.num_kv_heads, [&](int64_t task) {
    const char* half =
        pool.data + shape.Offset(page_ids[task / shape.num_kv_heads], task % shape.num_kv_heads);
    Dispatch2(shape.dtype, dtype, [&](auto like_pool, auto like_pages) {
      using Element = decltype(like_pool);
      auto* k_zh = static_cast<decltype(like_pages)*>(pages) + task * 2 * z * h;
      auto* v_zh = k_zh + z * h;
      const auto* keys = reinterpret_cast<const Element*>(half);
      const auto* values = reinterpret_cast<const Element*>(half + shape.half_bytes());
      for (int64_t first = 0; first < z; first += tile) {
        for (int64_t t = 0; t < tile; ++t) {
          for (int64_t d = 0; d < h; ++d) {
            Convert(keys[first * h + KeyIndex<Element>(t, d, tile)], k_zh + (first + t) * h + d);
          }
        }
      }
      for (int64_t i = 0; i < z * h; ++i) Convert(values[i], v_zh + i);
    });
  });
}

}  // namespace apex
