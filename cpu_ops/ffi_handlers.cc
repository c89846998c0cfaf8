// XLA's typed FFI handlers, and the C functions that Python sets the op up with.
//
// A handler turns buffers into views, checks shapes and values, and calls HostAttention. Handlers
// that write the pool take it as their first argument and return it, aliased: nothing is copied.

#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace apex {
namespace {

namespace ffi = xla::ffi;
using Int32Scalar = ffi::BufferR0<ffi::S32>;
using Int32Vector = ffi::BufferR1<ffi::S32>;
using Int32Matrix = ffi::BufferR2<ffi::S32>;

std::mutex op_mutex;
std::shared_ptr<HostAttention> current_op;

// The op as it is set up now; a call that runs keeps the one it started with.
std::shared_ptr<HostAttention> Op() {
  std::lock_guard<std::mutex> lock(op_mutex);
  return current_op;
}

ffi::Error Invalid(std::string message) {
  return message.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(std::move(message));
}

std::string ShapeText(ffi::Span<const int64_t> dimensions) {
  std::string text;
  for (int64_t dimension : dimensions)
    text += (text.empty() ? "" : ", ") + std::to_string(dimension);
  return "[" + text + "]";
}

bool ReadDType(ffi::DataType xla_dtype, DType* dtype) {
  switch (xla_dtype) {
    case ffi::F32:
      *dtype = DType::kFloat32;
      return true;
    case ffi::F16:
      *dtype = DType::kFloat16;
      return true;
    case ffi::BF16:
      *dtype = DType::kBFloat16;
      return true;
    default:
      return false;
  }
}

// A call's arguments, read one after the other. The first that is wrong leaves its message in
// `error`, and what is read after it means nothing.
struct Call {
  std::string error;
  Pool pool{};
  Tables tables{};
  int64_t padded_rows = 0;  // of every array of rows; the first tables.num_rows count
  std::shared_ptr<HostAttention> op = Op();

  explicit Call(const ffi::AnyBuffer& buffer) {
    if (op == nullptr) {
      error = "the host attention op is not set up: call load() first";
      return;
    }
    const auto dims = buffer.dimensions();
    if (dims.size() != 5 || dims[2] != 2) {
      error =
          "pool: shape " + ShapeText(dims) + ": must be [pages, kv heads, 2, page size, head_dim]";
      return;
    }
    pool.shape = {dims[0], dims[1], dims[3], dims[4], DType::kFloat32};
    pool.data = static_cast<char*>(buffer.untyped_data());
    if (!ReadDType(buffer.element_type(), &pool.shape.dtype)) {
      error = "pool: its dtype must be float32, float16 or bfloat16";
      return;
    }
    error = CheckPool(pool.shape);
  }

  // Rows of heads, [num_rows, heads, head_dim]; num_rows < 0 for any.
  HeadRows ReadRows(const char* name, const ffi::AnyBuffer& buffer, int64_t num_rows,
                    int64_t* num_heads) {
    HeadRows rows{buffer.untyped_data(), DType::kFloat32, 0};
    if (!error.empty()) return rows;
    const auto dims = buffer.dimensions();
    if (dims.size() != 3 || dims[2] != pool.shape.head_dim ||
        (num_rows >= 0 && dims[0] != num_rows)) {
      error = std::string(name) + ": shape " + ShapeText(dims) + ": must be [" +
              (num_rows >= 0 ? std::to_string(num_rows) : "rows") + ", heads, " +
              std::to_string(pool.shape.head_dim) + "]";
      return rows;
    }
    if (!ReadDType(buffer.element_type(), &rows.dtype)) {
      error = std::string(name) + ": its dtype must be float32, float16 or bfloat16";
      return rows;
    }
    *num_heads = dims[1];
    rows.row_stride = dims[1] * dims[2];
    return rows;
  }

  // num_rows: how many count; null for all.
  void ReadTables(const Int32Matrix& block_tables, const Int32Vector& lengths,
                  const Int32Scalar* num_rows, bool appends) {
    if (!error.empty()) return;
    const auto dims = block_tables.dimensions();
    if (lengths.dimensions()[0] != dims[0]) {
      error = "lengths: shape " + ShapeText(lengths.dimensions()) +
              ": must have as many rows as block_tables, shape " + ShapeText(dims);
      return;
    }
    padded_rows = dims[0];
    const int64_t count = num_rows == nullptr ? padded_rows : num_rows->typed_data()[0];
    if (num_rows != nullptr) error = CheckCount("num_rows", count, padded_rows);
    if (!error.empty()) return;
    tables = {block_tables.typed_data(), lengths.typed_data(), count, dims[1]};
    error = appends ? CheckAppend(pool.shape, tables) : CheckTables(pool.shape, tables);
  }

  void CheckKVHeads(const char* name, int64_t num_heads) {
    if (error.empty() && num_heads != pool.shape.num_kv_heads) {
      error = std::string(name) + ": " + std::to_string(num_heads) + " heads: the pool has " +
              std::to_string(pool.shape.num_kv_heads);
    }
  }

  void CheckQueryHeads(const char* name, int64_t num_heads) {
    if (error.empty() && (num_heads <= 0 || num_heads % pool.shape.num_kv_heads != 0)) {
      error = std::string(name) + ": " + std::to_string(num_heads) +
              " query heads: must be a multiple of the pool's " +
              std::to_string(pool.shape.num_kv_heads) + " kv heads";
    }
  }

  // [rows, num_heads, head_dim] in `dtype`, and [rows, num_heads] in float32.
  AttendOutput ReadOutput(ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::BufferR2<ffi::F32>> lse,
                          ffi::DataType dtype, int64_t num_heads) {
    if (error.empty()) {
      const int64_t rows = padded_rows;
      const auto dims = out->dimensions();
      const auto lse_dims = lse->dimensions();
      if (out->element_type() != dtype || dims.size() != 3 || dims[0] != rows ||
          dims[1] != num_heads || dims[2] != pool.shape.head_dim) {
        error = "out: shape " + ShapeText(dims) + " or dtype is not the queries'";
      } else if (lse_dims[0] != rows || lse_dims[1] != num_heads) {
        error = "lse: shape " + ShapeText(lse_dims) + ": must be [rows, query heads]";
      }
    }
    return {out->untyped_data(), lse->typed_data()};
  }

  void CheckAliased(ffi::Result<ffi::AnyBuffer> new_pool) {
    if (error.empty() && new_pool->untyped_data() != pool.data) {
      error = "pool: must be aliased to the result";
    }
  }

  // [i, kv heads, 2, page size, head_dim], of which the first num_pages count
  DType ReadPagesBuffer(const ffi::AnyBuffer& pages, const Int32Vector& page_ids,
                        int64_t num_pages, bool must_differ) {
    DType dtype = DType::kFloat32;
    if (!error.empty()) return dtype;
    const auto dims = pages.dimensions();
    const PoolShape& shape = pool.shape;
    const int64_t num_ids = page_ids.dimensions()[0];
    if (dims.size() != 5 || dims[0] != num_ids || dims[1] != shape.num_kv_heads || dims[2] != 2 ||
        dims[3] != shape.page_size || dims[4] != shape.head_dim) {
      error = "pages: shape " + ShapeText(dims) + ": must be the pool's, with " +
              std::to_string(num_ids) + " pages";
    } else if (!ReadDType(pages.element_type(), &dtype)) {
      error = "pages: their dtype must be float32, float16 or bfloat16";
    } else {
      error = CheckCount("num_pages", num_pages, num_ids);
      if (error.empty()) {
        error = CheckPageIds(shape, page_ids.typed_data(), num_pages, must_differ);
      }
    }
    return dtype;
  }
};

// Zeroes what lies behind the first `count` of an array's rows or pages.
template <class Buffer>
void ZeroBehind(const Buffer& array, int64_t count) {
  const auto num_bytes = static_cast<int64_t>(array.size_bytes());
  const int64_t used_bytes = num_bytes / array.dimensions()[0] * count;
  std::memset(static_cast<char*>(array.untyped_data()) + used_bytes, 0, num_bytes - used_bytes);
}

ffi::Error Allocate(ffi::Result<ffi::AnyBuffer> pool) {
  Call call(*pool);
  if (call.error.empty()) call.op->FirstTouch(pool->untyped_data(), pool->size_bytes());
  return Invalid(call.error);
}

ffi::Error Append(ffi::AnyBuffer pool, ffi::AnyBuffer k, ffi::AnyBuffer v, Int32Matrix block_tables,
                  Int32Vector lengths, Int32Scalar num_rows,
                  ffi::Result<ffi::AnyBuffer> new_pool) {
  Call call(pool);
  int64_t num_k = 0, num_v = 0;
  call.ReadTables(block_tables, lengths, &num_rows, /*appends=*/true);
  const HeadRows k_rows = call.ReadRows("k", k, call.padded_rows, &num_k);
  const HeadRows v_rows = call.ReadRows("v", v, call.padded_rows, &num_v);
  call.CheckKVHeads("k", num_k);
  call.CheckKVHeads("v", num_v);
  if (call.error.empty() && k_rows.dtype != v_rows.dtype) call.error = "v: its dtype must be k's";
  call.CheckAliased(new_pool);
  if (call.error.empty()) call.op->Append(call.pool, k_rows, v_rows, call.tables);
  return Invalid(call.error);
}

ffi::Error Attend(float scale, ffi::AnyBuffer pool, ffi::AnyBuffer q, Int32Matrix block_tables,
                  Int32Vector lengths, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::BufferR2<ffi::F32>> lse) {
  Call call(pool);
  int64_t num_heads = 0;
  call.ReadTables(block_tables, lengths, /*num_rows=*/nullptr, /*appends=*/false);
  const HeadRows rows = call.ReadRows("q", q, call.padded_rows, &num_heads);
  call.CheckQueryHeads("q", num_heads);
  const AttendOutput output = call.ReadOutput(out, lse, q.element_type(), num_heads);
  if (call.error.empty()) {
    call.op->Attend(call.pool, rows, num_heads, scale, call.tables, output);
  }
  return Invalid(call.error);
}

ffi::Error AppendAndAttend(float scale, ffi::AnyBuffer pool, ffi::AnyBuffer qkv,
                           Int32Matrix block_tables, Int32Vector lengths, Int32Scalar num_rows,
                           ffi::Result<ffi::AnyBuffer> new_pool, ffi::Result<ffi::AnyBuffer> out,
                           ffi::Result<ffi::BufferR2<ffi::F32>> lse) {
  Call call(pool);
  int64_t num_heads = 0;
  call.ReadTables(block_tables, lengths, &num_rows, /*appends=*/true);
  const HeadRows q = call.ReadRows("qkv", qkv, call.padded_rows, &num_heads);
  num_heads -= 2 * call.pool.shape.num_kv_heads;
  call.CheckQueryHeads("qkv", num_heads);
  const AttendOutput output = call.ReadOutput(out, lse, qkv.element_type(), num_heads);
  call.CheckAliased(new_pool);
  if (call.error.empty()) {
    const int64_t head_bytes = call.pool.shape.head_dim * SizeOf(q.dtype);
    HeadRows k = q, v = q;
    k.data = static_cast<const char*>(q.data) + num_heads * head_bytes;
    v.data = static_cast<const char*>(k.data) + call.pool.shape.num_kv_heads * head_bytes;
    call.op->Append(call.pool, k, v, call.tables);
    call.op->Attend(call.pool, q, num_heads, scale, call.tables, output);
    ZeroBehind(*out, call.tables.num_rows);
    ZeroBehind(*lse, call.tables.num_rows);
  }
  return Invalid(call.error);
}

ffi::Error WritePages(ffi::AnyBuffer pool, ffi::AnyBuffer pages, Int32Vector page_ids,
                      Int32Scalar num_pages, ffi::Result<ffi::AnyBuffer> new_pool) {
  Call call(pool);
  const int64_t count = num_pages.typed_data()[0];
  const DType dtype = call.ReadPagesBuffer(pages, page_ids, count, /*must_differ=*/true);
  call.CheckAliased(new_pool);
  if (call.error.empty()) {
    call.op->WritePages(call.pool, page_ids.typed_data(), count, pages.untyped_data(), dtype);
  }
  return Invalid(call.error);
}

ffi::Error ReadPages(ffi::AnyBuffer pool, Int32Vector page_ids, Int32Scalar num_pages,
                     ffi::Result<ffi::AnyBuffer> pages) {
  Call call(pool);
  const int64_t count = num_pages.typed_data()[0];
  const DType dtype = call.ReadPagesBuffer(*pages, page_ids, count, /*must_differ=*/false);
  if (call.error.empty()) {
    call.op->ReadPages(call.pool, page_ids.typed_data(), count, pages->untyped_data(), dtype);
    ZeroBehind(*pages, count);
  }
  return Invalid(call.error);
}

}  // namespace
}  // namespace apex

#define APEX_EXPORT extern "C" __attribute__((visibility("default")))

// Starts threads: the op runs with num_threads, worker i on cpus[i], at the instruction set `isa`
// ("" for the best). Returns what is wrong, or null. May be called again; calls that run finish as
// they were.
APEX_EXPORT const char* apex_configure(int num_threads, const int* cpus, int num_cpus,
                                       const char* isa) {
  static thread_local std::string error;
  const apex::Isa* found = apex::FindIsa(isa);
  if (found == nullptr) {
    error = "isa = '" + std::string(isa) + "': this CPU runs " + apex::SupportedIsas();
    return error.c_str();
  }
  auto op = std::make_shared<apex::HostAttention>(num_threads,
                                                  std::vector<int>(cpus, cpus + num_cpus), found);
  std::lock_guard<std::mutex> lock(apex::op_mutex);
  apex::current_op.swap(op);
  return nullptr;
}

APEX_EXPORT const char* apex_isa() {
  const auto op = apex::Op();
  return op == nullptr ? "" : op->isa().name;
}

APEX_EXPORT int apex_num_threads() {
  const auto op = apex::Op();
  return op == nullptr ? 0 : op->num_threads();
}

// Reads memory from the op's threads; see HostAttention::ReadAll. 0 if the op is not set up.
APEX_EXPORT uint64_t apex_read(const void* data, int64_t num_bytes) {
  const auto op = apex::Op();
  return op == nullptr ? 0 : op->ReadAll(data, num_bytes);
}

// Switches the recording of the op's threads on and off; see ThreadPool::Record. A new
// configuration does not record.
APEX_EXPORT void apex_record(int64_t capacity) {
  const auto op = apex::Op();
  if (op != nullptr) op->threads().Record(capacity);
}

// See ThreadPool::TakeSpans.
APEX_EXPORT int64_t apex_take_spans(apex::ThreadSpan* spans, int64_t max_spans,
                                    int64_t* num_dropped) {
  const auto op = apex::Op();
  return op == nullptr ? 0 : op->threads().TakeSpans(spans, max_spans, num_dropped);
}

// What is wrong with values that a call would write by, or null. A call itself finds out too late
// for its caller, who has given the pool away by then.
APEX_EXPORT const char* apex_check_append(int64_t num_pages, int64_t page_size,
                                          const int32_t* block_tables, const int32_t* lengths,
                                          int64_t num_rows, int64_t max_pages) {
  static thread_local std::string error;
  error = apex::CheckAppend({num_pages, 1, page_size, 8, apex::DType::kFloat32},
                            {block_tables, lengths, num_rows, max_pages});
  return error.empty() ? nullptr : error.c_str();
}

APEX_EXPORT const char* apex_check_written_pages(int64_t num_pages, const int32_t* page_ids,
                                                 int64_t num_ids) {
  static thread_local std::string error;
  error = apex::CheckPageIds({num_pages, 1, 8, 8, apex::DType::kFloat32}, page_ids, num_ids,
                             /*must_differ=*/true);
  return error.empty() ? nullptr : error.c_str();
}

APEX_EXPORT const char* apex_supported_isas() {
  static const std::string names = apex::SupportedIsas();
  return names.c_str();
}

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(apex_allocate, apex::Allocate,
                              xla::ffi::Ffi::Bind().Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(apex_append, apex::Append,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<apex::Int32Matrix>()
                                  .Arg<apex::Int32Vector>()
                                  .Arg<apex::Int32Scalar>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(apex_attend, apex::Attend,
                              xla::ffi::Ffi::Bind()
                                  .Attr<float>("scale")
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<apex::Int32Matrix>()
                                  .Arg<apex::Int32Vector>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(apex_append_and_attend, apex::AppendAndAttend,
                              xla::ffi::Ffi::Bind()
                                  .Attr<float>("scale")
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<apex::Int32Matrix>()
                                  .Arg<apex::Int32Vector>()
                                  .Arg<apex::Int32Scalar>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(apex_write_pages, apex::WritePages,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<apex::Int32Vector>()
                                  .Arg<apex::Int32Scalar>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(apex_read_pages, apex::ReadPages,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<apex::Int32Vector>()
                                  .Arg<apex::Int32Scalar>()
                                  .Ret<xla::ffi::AnyBuffer>());
