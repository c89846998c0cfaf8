// Paged decode attention on the host: what the op does, without XLA's types.
//
// Everything works on the KV pool of one layer (layout.h). Arguments are described by views that
// own nothing; the Check functions say what is wrong with their values ("" for nothing), and the
// others rely on it: they must not be called with values that were not checked.

#ifndef APEX_JAX_CPU_OPS_ATTENTION_H_
#define APEX_JAX_CPU_OPS_ATTENTION_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "dtypes.h"
#include "isa.h"
#include "layout.h"
#include "thread_pool.h"

namespace apex {

struct Pool {
  PoolShape shape;
  char* data;
};

// Rows of adjacent heads of head_dim elements: queries [b, n, h], keys or values [b, k, h], or a
// slice of an array that holds all three.
struct HeadRows {
  const void* data;
  DType dtype;
  int64_t row_stride;  // elements from a row to the next
};

// The pages of each row's sequence, and the tokens that they hold.
struct Tables {
  const int32_t* block_tables_bm;
  const int32_t* lengths_b;
  int64_t num_rows;
  int64_t max_pages;  // m

  const int32_t* pages(int64_t row) const { return block_tables_bm + row * max_pages; }
};

struct AttendOutput {
  void* out_bnh;  // in the dtype of the queries
  float* lse_bn;
};

std::string CheckPool(const PoolShape& shape);
// Of how many rows or pages of padded arrays count.
std::string CheckCount(const std::string& name, int64_t count, int64_t most);
std::string CheckTables(const PoolShape& shape, const Tables& tables);
// Also that no two rows would write to one slot.
std::string CheckAppend(const PoolShape& shape, const Tables& tables);
std::string CheckPageIds(const PoolShape& shape, const int32_t* page_ids, int64_t num_ids,
                         bool must_differ);

// Threads, instruction set and buffers. Calls take turns.
class HostAttention {
 public:
  HostAttention(int num_threads, std::vector<int> cpus, const Isa* isa)
      : isa_(isa), threads_(num_threads, std::move(cpus)) {}

  const Isa& isa() const { return *isa_; }
  int num_threads() const { return threads_.num_threads(); }
  ThreadPool& threads() { return threads_; }

  // Writes the last token of every row, at index lengths[b] - 1.
  void Append(const Pool& pool, const HeadRows& k, const HeadRows& v, const Tables& tables);

  // softmax(scale * q k^T) v of every row over its lengths[b] tokens. num_heads is a multiple of
  // the pool's.
  void Attend(const Pool& pool, const HeadRows& q, int64_t num_heads, float scale,
              const Tables& tables, const AttendOutput& output);

  // Copies whole pages between the pool and `pages`, [i, kv head, K or V, token, dim] of any dtype.
  void WritePages(const Pool& pool, const int32_t* page_ids, int64_t num_ids, const void* pages,
                  DType dtype);
  void ReadPages(const Pool& pool, const int32_t* page_ids, int64_t num_ids, void* pages,
                 DType dtype);

  // Zeroes fresh memory from all threads, in huge pages where the system has them: first touch
  // decides the NUMA node a page lies on.
  void FirstTouch(void* data, int64_t num_bytes);

  // Reads every cache line once, in order, from all threads, and returns a sum of it: what the
  // machine's memory gives, to measure the kernel by.
  uint64_t ReadAll(const void* data, int64_t num_bytes);

 private:
  const Isa* isa_;
  std::mutex turn_;  // the buffers'
  std::vector<float> max_, sum_, weighted_;
  std::vector<int32_t> chunk_rows_, first_chunks_;
  std::unique_ptr<std::atomic<int32_t>[]> chunks_left_;
  int64_t num_chunks_left_ = 0;
  ThreadPool threads_;
};

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_ATTENTION_H_
