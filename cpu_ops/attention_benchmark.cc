// Times the kernel alone, beside reading the same memory, in turns so that noise meets all alike.
//
//   attention_benchmark [key=value ...]
//     kv_heads=8 group=4 head_dim=128 dtype=bf16 page=64 context=1024 batch=16 threads=1 isa=
//     rounds=9 queries=      fp32, fp16 or bf16; as the KV if empty
//     count=0                1: also count the instructions of one call (ten seconds a million)
//
// The KV is a pool of at least `pool_mib` (2304), whose pages are dealt out at random; every call
// attends to another part of it, so that no cache serves it, unless pool_mib is small. Prints one
// line of JSON: the settings, and a rate in GB of KV per second for every round of each contestant.
// Built with ggml (CMakeLists.txt), its flash attention over the same memory is one of them.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "count_instructions.h"
#ifdef APEX_WITH_GGML
#include "ggml_peer.h"
#endif

namespace apex {
namespace {

using Settings = std::map<std::string, std::string>;

const std::map<std::string, DType> kDTypes = {
    {"bf16", DType::kBFloat16}, {"fp16", DType::kFloat16}, {"fp32", DType::kFloat32}};

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Calls of one kind, each over the next part of the pool.
struct Contestant {
  std::string name;
  double bytes_per_call;
  std::function<void(int64_t slice)> call;
  int64_t slice;
  std::vector<double> gb_per_sec = {};
  double least_microseconds = 1e30;

  // Goes through slices in turn until 100 ms have passed; before that, threads of the contestant
  // before may stop to spin.
  void Time(int64_t num_slices) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    int64_t num_calls = 0;
    const double begin = Seconds();
    double seconds = 0;
    do {
      call(slice);
      slice = (slice + 1) % num_slices;
      ++num_calls;
      seconds = Seconds() - begin;
    } while (seconds < 0.1);
    gb_per_sec.push_back(num_calls * bytes_per_call / seconds / 1e9);
    least_microseconds = std::min(least_microseconds, seconds / num_calls * 1e6);
  }
};

// Changes settings as the arguments say; returns the first argument that names none, or null.
const char* Parse(int argc, char** argv, Settings* settings) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    if (equals == std::string::npos || settings->count(argument.substr(0, equals)) == 0) {
      return argv[i];
    }
    (*settings)[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  return nullptr;
}

// per_line: instructions for 64 bytes of KV, negative if they were not counted.
void Print(const Settings& settings, const std::vector<Contestant>& contestants, double per_line) {
  std::printf("{");
  for (const auto& [key, value] : settings) {
    const bool is_number = !value.empty() && value.find_first_not_of("0123456789") == value.npos;
    std::printf("\"%s\": %s%s%s, ", key.c_str(), is_number ? "" : "\"", value.c_str(),
                is_number ? "" : "\"");
  }
  if (per_line >= 0) std::printf("\"instructions_per_64_bytes\": %.2f, ", per_line);
  const char* separator = "";
  for (const Contestant& one : contestants) {
    std::printf("%s\"%s\": {\"least_microseconds_per_call\": %.2f, \"gb_per_sec\": [", separator,
                one.name.c_str(), one.least_microseconds);
    for (size_t i = 0; i < one.gb_per_sec.size(); ++i) {
      std::printf("%s%.2f", i == 0 ? "" : ", ", one.gb_per_sec[i]);
    }
    std::printf("]}");
    separator = ", ";
  }
  std::printf("}\n");
}

int Main(int argc, char** argv) {
  Settings settings = {{"kv_heads", "8"}, {"group", "4"},   {"head_dim", "128"}, {"dtype", "bf16"},
                       {"page", "64"},    {"threads", "1"}, {"context", "1024"}, {"batch", "16"},
                       {"isa", ""},       {"rounds", "9"},  {"pool_mib", "2304"}, {"queries", ""},
                       {"count", "0"}};
  if (const char* unknown = Parse(argc, argv, &settings)) {
    std::fprintf(stderr, "unknown setting '%s'\n", unknown);
    return 2;
  }
  if (settings["queries"].empty()) settings["queries"] = settings["dtype"];
  const Isa* isa = FindIsa(settings["isa"]);
  if (isa == nullptr || kDTypes.count(settings["dtype"]) == 0 ||
      kDTypes.count(settings["queries"]) == 0) {
    std::fprintf(stderr, "unknown isa or dtype; this CPU runs %s\n", SupportedIsas().c_str());
    return 2;
  }
  settings["isa"] = isa->name;
  const auto number = [&](const char* key) { return std::atoll(settings[key].c_str()); };
  HostAttention op(static_cast<int>(number("threads")), {}, isa);
  Pool pool{
      {0, number("kv_heads"), number("page"), number("head_dim"), kDTypes.at(settings["dtype"])},
      nullptr};
  PoolShape& shape = pool.shape;
  const int64_t batch = number("batch"), context = number("context");
  const int64_t num_heads = shape.num_kv_heads * number("group");
  const int64_t max_pages = (context + shape.page_size - 1) / shape.page_size;
  const int64_t call_pages = batch * max_pages;
  const int64_t slice_bytes = call_pages * shape.page_bytes();
  const int64_t num_slices = std::max<int64_t>(2, number("pool_mib") * (1 << 20) / slice_bytes);
  shape.num_pages = num_slices * call_pages;
  const int64_t pool_bytes = shape.num_pages * shape.page_bytes();
  pool.data = static_cast<char*>(std::aligned_alloc(2 << 20, (pool_bytes >> 21 << 21) + (2 << 20)));
  op.FirstTouch(pool.data, pool_bytes);

  std::vector<int32_t> page_ids(shape.num_pages);
  std::iota(page_ids.begin(), page_ids.end(), 0);
  std::shuffle(page_ids.begin(), page_ids.end(), std::mt19937(1));
  const std::vector<int32_t> lengths(batch, static_cast<int32_t>(context));
  const DType q_dtype = kDTypes.at(settings["queries"]);
  std::vector<char> q(batch * num_heads * shape.head_dim * SizeOf(q_dtype)), out(q.size());
  std::vector<float> lse(batch * num_heads);

  const double kv_bytes =
      2.0 * batch * context * shape.num_kv_heads * shape.head_dim * SizeOf(shape.dtype);
  const float scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
  const auto attend = [&](int64_t slice) {
    const Tables tables = {page_ids.data() + slice * call_pages, lengths.data(), batch, max_pages};
    op.Attend(pool, {q.data(), q_dtype, num_heads * shape.head_dim}, num_heads, scale, tables,
              {out.data(), lse.data()});
  };
  volatile uint64_t sink = 0;
  std::vector<Contestant> contestants = {
      {"read", static_cast<double>(slice_bytes),
       [&](int64_t slice) {
         sink = sink + op.ReadAll(pool.data + slice * slice_bytes, slice_bytes);
       },
       num_slices / 2},
      {"attend", kv_bytes, attend, 0}};
#ifdef APEX_WITH_GGML
  const GgmlShape ggml_shape = {num_heads, shape.num_kv_heads, shape.head_dim, context, batch,
                                shape.dtype};
  GgmlPeer by_head(ggml_shape, /*token_major=*/false, op.num_threads());
  GgmlPeer by_token(ggml_shape, /*token_major=*/true, op.num_threads());
  contestants.push_back(
      {"ggml_by_head", kv_bytes,
       [&](int64_t slice) { by_head.Attend(pool.data + slice * slice_bytes); }, 0});
  contestants.push_back(
      {"ggml_by_token", kv_bytes,
       [&](int64_t slice) { by_token.Attend(pool.data + slice * slice_bytes); }, 0});
#endif
  for (int64_t round = 0; round < number("rounds"); ++round) {
    for (Contestant& contestant : contestants) contestant.Time(num_slices);
  }
  const int64_t instructions =
      number("count") == 0 ? -1 : CountInstructions([&] { attend(0); });
  Print(settings, contestants, instructions / (kv_bytes / 64));
  std::free(pool.data);
  return 0;
}

}  // namespace
}  // namespace apex

int main(int argc, char** argv) { return apex::Main(argc, argv); }
