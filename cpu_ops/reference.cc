#include "reference.h"

#include <algorithm>
#include <cmath>

namespace apex {
namespace {

double ElementAt(const void* data, DType dtype, int64_t index) {
  return Dispatch(dtype, [&](auto like) -> double {
    return ToFloat(static_cast<const decltype(like)*>(data)[index]);
  });
}

}  // namespace

double ReferenceElement(const Pool& pool, const int32_t* pages, int64_t kv_head, int half,
                        int64_t token, int64_t dim) {
  const PoolShape& shape = pool.shape;
  const int64_t slot = token % shape.page_size;
  const char* data =
      pool.data + shape.Offset(pages[token / shape.page_size], kv_head) + half * shape.half_bytes();
  if (half == 1) return ElementAt(data, shape.dtype, slot * shape.head_dim + dim);
  const int64_t tile = shape.tile();
  const int64_t in_tile = Dispatch(
      shape.dtype, [&](auto like) { return KeyIndex<decltype(like)>(slot % tile, dim, tile); });
  return ElementAt(data, shape.dtype, slot / tile * tile * shape.head_dim + in_tile);
}

void ReferenceAttend(const Pool& pool, const HeadRows& q, int64_t num_heads, double scale,
                     const Tables& tables, std::vector<double>* out_bnh,
                     std::vector<double>* lse_bn) {
  const int64_t h = pool.shape.head_dim;
  const int64_t group = num_heads / pool.shape.num_kv_heads;
  out_bnh->assign(tables.num_rows * num_heads * h, 0);
  lse_bn->assign(tables.num_rows * num_heads, 0);
  for (int64_t query = 0; query < tables.num_rows * num_heads; ++query) {
    const int64_t row = query / num_heads, head = query % num_heads, kv_head = head / group;
    const int64_t length = tables.lengths_b[row];
    std::vector<double> scores_s(length, 0);
    for (int64_t s = 0; s < length; ++s) {
      for (int64_t d = 0; d < h; ++d) {
        scores_s[s] += scale * ElementAt(q.data, q.dtype, row * q.row_stride + head * h + d) *
                       ReferenceElement(pool, tables.pages(row), kv_head, 0, s, d);
      }
    }
    const double max = *std::max_element(scores_s.begin(), scores_s.end());
    double sum = 0;
    for (double score : scores_s) sum += std::exp(score - max);
    (*lse_bn)[query] = max + std::log(sum);
    for (int64_t d = 0; d < h; ++d) {
      for (int64_t s = 0; s < length; ++s) {
        (*out_bnh)[query * h + d] += std::exp(scores_s[s] - max) / sum *
                                     ReferenceElement(pool, tables.pages(row), kv_head, 1, s, d);
      }
    }
  }
}

}  // namespace apex
