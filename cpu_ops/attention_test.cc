// Tests of the op without XLA, made to run under sanitizers: every instruction set that this CPU
// has, random shapes and pages, buffers of exactly the size they need.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "reference.h"

namespace apex {
namespace {

int num_failures = 0;

void Expect(bool holds, const std::string& what) {
  if (holds) return;
  ++num_failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

std::mt19937 random_bits(20260101);

int64_t RandomInt(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

float RandomNormal() { return std::normal_distribution<float>()(random_bits); }

std::vector<char> RandomElements(DType dtype, int64_t count) {
  std::vector<char> bytes(count * SizeOf(dtype));
  Dispatch(dtype, [&](auto like) {
    auto* elements = reinterpret_cast<decltype(like)*>(bytes.data());
    for (int64_t i = 0; i < count; ++i) FromFloat(RandomNormal(), elements + i);
  });
  return bytes;
}

// A pool whose every element is NaN until it is appended, and rows of random lengths.
struct Case {
  Pool pool;
  std::vector<char> pool_bytes;
  int64_t group, num_heads;
  std::vector<int32_t> lengths, block_tables;
  Tables tables;
  DType q_dtype;
  std::vector<char> q;
  HeadRows q_rows;
  float scale;

  Case(DType kv_dtype, int64_t num_rows, int64_t max_length) {
    const int64_t page_sizes[] = {8, 16, 24, 32, 64};
    const int64_t head_dims[] = {8, 24, 64, 72, 80, 96, 128, 136};
    PoolShape& shape = pool.shape;
    shape = {0, RandomInt(1, 3), page_sizes[RandomInt(0, 4)], head_dims[RandomInt(0, 7)], kv_dtype};
    group = RandomInt(1, 9);
    num_heads = group * shape.num_kv_heads;
    int64_t max_pages = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
      lengths.push_back(static_cast<int32_t>(RandomInt(1, max_length)));
      const int64_t pages = (lengths.back() + shape.page_size - 1) / shape.page_size;
      max_pages = std::max(max_pages, pages);
    }
    std::vector<int32_t> ids(num_rows * max_pages);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    std::shuffle(ids.begin(), ids.end(), random_bits);
    block_tables = ids;
    shape.num_pages = static_cast<int64_t>(ids.size());
    pool_bytes.assign(shape.num_pages * shape.page_bytes(), static_cast<char>(0xff));
    pool.data = pool_bytes.data();
    tables = {block_tables.data(), lengths.data(), num_rows, max_pages};
    q_dtype = static_cast<DType>(RandomInt(0, 2));
    q = RandomElements(q_dtype, num_rows * num_heads * shape.head_dim);
    q_rows = {q.data(), q_dtype, num_heads * shape.head_dim};
    scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
  }

  // Appends every token of every row, and expects to find it where the twin looks for it.
  void Fill(HostAttention& op) {
    const PoolShape& shape = pool.shape;
    const int64_t stride = shape.num_kv_heads * shape.head_dim;
    const std::vector<int32_t> final_lengths = lengths;
    const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
    for (int32_t token = 0; token < longest; ++token) {
      for (size_t row = 0; row < lengths.size(); ++row) {
        lengths[row] = std::min(token + 1, final_lengths[row]);
      }
      const std::vector<char> k = RandomElements(shape.dtype, stride * tables.num_rows);
      const std::vector<char> v = RandomElements(shape.dtype, stride * tables.num_rows);
      Expect(CheckAppend(shape, tables).empty(), "a valid append is accepted");
      op.Append(pool, {k.data(), shape.dtype, stride}, {v.data(), shape.dtype, stride}, tables);
      const double found = ReferenceElement(pool, tables.pages(0), 0, 1, lengths[0] - 1, 3);
      const double given = Dispatch(shape.dtype, [&](auto like) -> double {
        return ToFloat(reinterpret_cast<const decltype(like)*>(v.data())[3]);
      });
      Expect(found == given, "an appended value is where it belongs");
    }
    lengths = final_lengths;
  }

  std::string Text() const {
    std::ostringstream text;
    const PoolShape& shape = pool.shape;
    text << "dtype " << static_cast<int>(shape.dtype) << " q " << static_cast<int>(q_dtype)
         << " kv heads " << shape.num_kv_heads << " group " << group << " page " << shape.page_size
         << " head_dim " << shape.head_dim << " first length " << lengths[0];
    return text.str();
  }
};

struct Result {
  std::vector<char> out;
  std::vector<float> lse;
};

Result Attend(HostAttention& op, const Case& c) {
  Result result;
  result.out.resize(c.q.size());
  result.lse.resize(c.tables.num_rows * c.num_heads);
  op.Attend(c.pool, c.q_rows, c.num_heads, c.scale, c.tables,
            {result.out.data(), result.lse.data()});
  return result;
}

const char* const kIsas[] = {"avx512", "avx2", "neon", "portable"};

void TestAgainstReference() {
  for (const char* name : kIsas) {
    const Isa* isa = FindIsa(name);
    if (isa == nullptr) {
      std::printf("skipped: this CPU does not run %s\n", name);
      continue;
    }
    HostAttention one(1, {}, isa), three(3, {}, isa);
    for (int repeat = 0; repeat < 24; ++repeat) {
      Case c(static_cast<DType>(repeat % 3), RandomInt(1, 3), repeat % 4 == 0 ? 1300 : 90);
      c.Fill(three);
      const Result result = Attend(one, c), again = Attend(three, c);
      Expect(result.out == again.out && result.lse == again.lse,
             std::string("one thread equals three, ") + name + ": " + c.Text());
      std::vector<double> out_bnh, lse_bn;
      ReferenceAttend(c.pool, c.q_rows, c.num_heads, c.scale, c.tables, &out_bnh, &lse_bn);
      // Outputs are averages of standard normals: half a unit of the output's own rounding, and
      // 4e-6 for the sums in float32.
      const double unit = c.q_dtype == DType::kFloat32   ? 0
                          : c.q_dtype == DType::kFloat16 ? 0x1p-11
                                                         : 0x1p-8;
      double worst = 0;
      for (size_t i = 0; i < out_bnh.size(); ++i) {
        const double out = Dispatch(c.q_dtype, [&](auto like) -> double {
          return ToFloat(reinterpret_cast<const decltype(like)*>(result.out.data())[i]);
        });
        const double error = std::abs(out - out_bnh[i]) - unit * std::abs(out_bnh[i]);
        worst = error <= worst ? worst : error;  // NaN counts
      }
      for (size_t i = 0; i < lse_bn.size(); ++i) {
        const double error = std::abs(result.lse[i] - lse_bn[i]) / 4;
        worst = error <= worst ? worst : error;
      }
      Expect(worst < 4e-6,
             std::string(name) + ": error " + std::to_string(worst) + ", " + c.Text());
    }
  }
}

// Rows of a padded batch: only those that count are checked, read and written.
void TestPaddingRows() {
  HostAttention op(2, {}, FindIsa(""));
  for (int repeat = 0; repeat < 9; ++repeat) {
    Case c(static_cast<DType>(repeat % 3), 3, 700);
    c.Fill(op);
    const Result whole = Attend(op, c);
    const int64_t num_rows = c.tables.num_rows = 1 + repeat % 2;
    std::fill(c.lengths.begin() + num_rows, c.lengths.end(), -7);
    std::fill(c.block_tables.begin() + num_rows * c.tables.max_pages, c.block_tables.end(),
              1 << 30);
    Expect(CheckAppend(c.pool.shape, c.tables).empty(), "padding rows are not checked");
    const Result part = Attend(op, c);
    const auto used = part.out.begin() + num_rows * (c.q.size() / c.lengths.size());
    Expect(std::equal(part.out.begin(), used, whole.out.begin()) &&
               std::equal(part.lse.begin(), part.lse.end(), whole.lse.begin()),
           "the rows that count: " + c.Text());
    Expect(std::count(used, part.out.end(), 0) == part.out.end() - used, "the others: " + c.Text());
  }
}

void TestPagesRoundTrip() {
  HostAttention op(2, {}, FindIsa(""));
  for (int repeat = 0; repeat < 9; ++repeat) {
    Case c(static_cast<DType>(repeat % 3), 3, 100);
    const PoolShape& shape = c.pool.shape;
    const int64_t count = shape.page_bytes() / SizeOf(shape.dtype);
    const std::vector<char> pages = RandomElements(shape.dtype, 2 * count);
    const int32_t ids[] = {static_cast<int32_t>(shape.num_pages - 1), 0};
    op.WritePages(c.pool, ids, 2, pages.data(), shape.dtype);
    std::vector<char> read(pages.size());
    op.ReadPages(c.pool, ids, 2, read.data(), shape.dtype);
    Expect(read == pages, "pages read are pages written: " + c.Text());
    const double third_key = Dispatch(shape.dtype, [&](auto like) -> double {
      return ToFloat(reinterpret_cast<const decltype(like)*>(pages.data())[2 * shape.head_dim + 5]);
    });
    Expect(ReferenceElement(c.pool, ids, 0, 0, 2, 5) == third_key, "keys are tiled: " + c.Text());
  }
}

void TestConversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    Half half_again;
    FromFloat(ToFloat(half), &half_again);
    const BFloat bfloat{static_cast<uint16_t>(bits)};
    BFloat bfloat_again;
    FromFloat(ToFloat(bfloat), &bfloat_again);
    if (std::isnan(ToFloat(half))) {
      Expect(std::isnan(ToFloat(half_again)), "float16 NaN");
    } else {
      Expect(half_again.bits == bits, "float16 " + std::to_string(bits));
    }
    if (std::isnan(ToFloat(bfloat))) {
      Expect(std::isnan(ToFloat(bfloat_again)), "bfloat16 NaN");
    } else {
      Expect(bfloat_again.bits == bits, "bfloat16 " + std::to_string(bits));
    }
  }
}

void TestRefusals() {
  const PoolShape shape = {4, 2, 16, 64, DType::kFloat16};
  const int32_t pages[] = {0, 1, 2, 4};
  const auto check = [&](int32_t a, int32_t b) {
    const int32_t lengths[] = {a, b};
    return CheckTables(shape, {pages, lengths, 2, 2});
  };
  Expect(check(32, 16).empty(), "tables within bounds");
  Expect(check(0, 16).find("lengths[0] = 0") == 0, "length zero");
  Expect(check(32, -5).find("lengths[1] = -5") == 0, "negative length");
  Expect(check(33, 16).find("lengths[0] = 33") == 0, "length beyond the table");
  Expect(check(32, 17).find("block_tables[1, 1] = 4") == 0, "page out of range");
  const int32_t lengths[] = {5, 5}, same[] = {3, 3};
  Expect(CheckAppend(shape, {same, lengths, 2, 1}).find("block_tables: two rows") == 0, "one slot");
  Expect(CheckPageIds(shape, same, 2, true).find("page_ids: page 3") == 0, "a page named twice");
  Expect(CheckPageIds(shape, same, 2, false).empty(), "a page read twice");
  Expect(CheckCount("rows", 1, 2).empty() && CheckCount("rows", 2, 2).empty(), "a count");
  Expect(CheckCount("rows", 0, 2).find("rows = 0: must be from 1 to 2") == 0, "no rows");
  Expect(CheckCount("rows", 3, 2).find("rows = 3") == 0, "more rows than there are");
  Expect(FindIsa("sse9") == nullptr, "unknown instruction set");
}

// Several callers, pools that come and go, regions of one task and of many.
void TestThreadPool() {
  for (int repeat = 0; repeat < 20; ++repeat) {
    ThreadPool threads(static_cast<int>(RandomInt(1, 4)), {0});
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) {
      callers.emplace_back([&threads, caller] {
        for (int64_t num_tasks : {0, 1, 2, 7, 100}) {
          std::vector<int> runs(num_tasks, 0);
          threads.Run(num_tasks, [&](int64_t task) { ++runs[task]; });
          Expect(runs == std::vector<int>(num_tasks, 1),
                 "every task runs once, caller " + std::to_string(caller));
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
}

void TestRecording() {
  constexpr int kThreads = 3, kRegions = 200, kCapacity = 64;
  ThreadPool threads(kThreads, {});
  int64_t num_dropped = 0;
  std::vector<ThreadSpan> spans(kCapacity + 1);
  const auto take = [&] { return threads.TakeSpans(spans.data(), kCapacity + 1, &num_dropped); };
  const auto run = [&](int64_t num_tasks) { threads.Run(num_tasks, [](int64_t) {}); };

  run(5);
  Expect(take() == 0 && num_dropped == 0, "nothing is recorded unless asked for");
  threads.Record(kCapacity);
  run(0);
  Expect(take() == 0, "a region without tasks has no span");
  for (int64_t num_tasks : {1, 2, 50}) {
    run(num_tasks);
    const int64_t num_spans = take();
    int64_t tasks = 0;
    int32_t last_thread = -1;
    for (int64_t i = 0; i < num_spans; ++i) {
      Expect(spans[i].thread > last_thread && spans[i].thread < kThreads, "a span for each thread");
      Expect(spans[i].num_tasks > 0 && spans[i].start_ns <= spans[i].end_ns, "a span of tasks");
      last_thread = spans[i].thread;
      tasks += spans[i].num_tasks;
    }
    Expect(tasks == num_tasks && num_dropped == 0, "spans hold every task");
  }
  for (int i = 0; i < kCapacity + 6; ++i) run(1);
  Expect(threads.TakeSpans(spans.data(), 10, &num_dropped) == 10 && num_dropped == 6,
         "spans beyond the capacity are dropped and counted");
  Expect(take() == kCapacity - 10 && num_dropped == 0, "the rest is kept, in order");
  for (int64_t i = 1; i < kCapacity - 10; ++i) {
    Expect(spans[i - 1].end_ns <= spans[i].start_ns, "regions come one after the other");
  }

  // Taking, and switching on and off, while two callers run regions.
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller) {
    callers.emplace_back([&run] {
      for (int i = 0; i < kRegions; ++i) run(4);
    });
  }
  for (int i = 0; i < kRegions; ++i) {
    if (i % 50 == 0) threads.Record(i % 100 == 0 ? kCapacity : 0);
    take();
  }
  for (std::thread& caller : callers) caller.join();
  threads.Record(0);
  run(4);
  Expect(take() == 0, "nothing is recorded once it is switched off");
}

}  // namespace
}  // namespace apex

int main() {
  apex::TestConversions();
  apex::TestRefusals();
  apex::TestThreadPool();
  apex::TestRecording();
  apex::TestPagesRoundTrip();
  apex::TestPaddingRows();
  apex::TestAgainstReference();
  std::printf("%s, %d failures; this CPU runs %s\n", apex::num_failures ? "FAILED" : "passed",
              apex::num_failures, apex::SupportedIsas().c_str());
  return apex::num_failures ? 1 : 0;
}
