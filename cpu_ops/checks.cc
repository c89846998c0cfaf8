// What may be wrong with the values of arguments. Messages name the argument, the index and the
// value.

#include <algorithm>

#include "attention.h"

namespace apex {
namespace {

std::string Text(int64_t value) { return std::to_string(value); }

std::string PageOutOfRange(const std::string& entry, int32_t page, const PoolShape& shape) {
  return entry + " = " + Text(page) + ": must be in [0, " + Text(shape.num_pages) +
         "), the pages of the pool";
}

// A value that occurs twice, or null.
template <class Value>
const Value* FindDuplicate(std::vector<Value>& values) {
  std::sort(values.begin(), values.end());
  const auto found = std::adjacent_find(values.begin(), values.end());
  return found == values.end() ? nullptr : &*found;
}

}  // namespace

std::string CheckPool(const PoolShape& shape) {
  if (shape.page_size <= 0 || shape.page_size % 8 != 0) {
    return "pool: page_size = " + Text(shape.page_size) + ": must be a positive multiple of 8";
  }
  if (shape.head_dim <= 0 || shape.head_dim % 8 != 0 || shape.head_dim > kMaxHeadDim) {
    return "pool: head_dim = " + Text(shape.head_dim) + ": must be a multiple of 8 from 8 to " +
           Text(kMaxHeadDim);
  }
  if (shape.num_kv_heads <= 0) {
    return "pool: num_kv_heads = " + Text(shape.num_kv_heads) + ": must be at least 1";
  }
  return "";
}

std::string CheckCount(const std::string& name, int64_t count, int64_t most) {
  if (count >= 1 && count <= most) return "";
  return name + " = " + Text(count) + ": must be from 1 to " + Text(most) +
         ", what the arrays hold";
}

std::string CheckTables(const PoolShape& shape, const Tables& tables) {
  for (int64_t row = 0; row < tables.num_rows; ++row) {
    const int64_t length = tables.lengths_b[row];
    if (length < 1 || length > tables.max_pages * shape.page_size) {
      return "lengths[" + Text(row) + "] = " + Text(length) + ": must be from 1 to " +
             Text(tables.max_pages * shape.page_size) + ", what the block table's " +
             Text(tables.max_pages) + " pages of " + Text(shape.page_size) + " tokens hold";
    }
    const int64_t num_pages = (length + shape.page_size - 1) / shape.page_size;
    for (int64_t i = 0; i < num_pages; ++i) {
      const int32_t page = tables.pages(row)[i];
      if (page < 0 || page >= shape.num_pages) {
        return PageOutOfRange("block_tables[" + Text(row) + ", " + Text(i) + "]", page, shape);
      }
    }
  }
  return "";
}

std::string CheckAppend(const PoolShape& shape, const Tables& tables) {
  std::string error = CheckTables(shape, tables);
  if (!error.empty()) return error;
  std::vector<int64_t> slots;
  for (int64_t row = 0; row < tables.num_rows; ++row) {
    const int64_t token = tables.lengths_b[row] - 1;
    slots.push_back(tables.pages(row)[token / shape.page_size] * shape.page_size +
                    token % shape.page_size);
  }
  if (const int64_t* slot = FindDuplicate(slots)) {
    return "block_tables: two rows append to slot " + Text(*slot % shape.page_size) + " of page " +
           Text(*slot / shape.page_size);
  }
  return "";
}

std::string CheckPageIds(const PoolShape& shape, const int32_t* page_ids, int64_t num_ids,
                         bool must_differ) {
  for (int64_t i = 0; i < num_ids; ++i) {
    if (page_ids[i] < 0 || page_ids[i] >= shape.num_pages) {
      return PageOutOfRange("page_ids[" + Text(i) + "]", page_ids[i], shape);
    }
  }
  if (!must_differ) return "";
  std::vector<int32_t> ids(page_ids, page_ids + num_ids);
  if (const int32_t* page = FindDuplicate(ids)) {
    return "page_ids: page " + Text(*page) + " is named twice";
  }
  return "";
}

}  // namespace apex
