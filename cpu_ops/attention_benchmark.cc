// Times the kernel alone, beside reading the same memory, in turns so that noise meets both alike.
//
//   attention_benchmark [key=value ...]
//     kv_heads=8 group=4 head_dim=128 dtype=bf16 page=64 context=1024 batch=16 threads=1 isa=
//     rounds=9
//
// The KV is a pool of at least `pool_mib` (2304), whose pages are dealt out at random; every call
// attends to another part of it, so that no cache serves it. Prints one line: GB/s of KV (median,
// worst), GB/s of the read, and the median of the rounds' quotients.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention.h"

namespace apex {
namespace {

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

int Main(int argc, char** argv) {
  std::map<std::string, std::string> settings = {
      {"kv_heads", "8"}, {"group", "4"},   {"head_dim", "128"}, {"dtype", "bf16"},
      {"page", "64"},    {"threads", "1"}, {"context", "1024"}, {"batch", "16"},
      {"isa", ""},       {"rounds", "9"},  {"pool_mib", "2304"}};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    if (equals == std::string::npos || settings.count(argument.substr(0, equals)) == 0) {
      std::fprintf(stderr, "unknown setting '%s'\n", argv[i]);
      return 2;
    }
    settings[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  const auto number = [&](const char* key) { return std::atoll(settings[key].c_str()); };
  const std::map<std::string, DType> dtypes = {
      {"bf16", DType::kBFloat16}, {"fp16", DType::kFloat16}, {"fp32", DType::kFloat32}};

  const Isa* isa = FindIsa(settings["isa"]);
  if (isa == nullptr || dtypes.count(settings["dtype"]) == 0) {
    std::fprintf(stderr, "unknown isa or dtype; this CPU runs %s\n", SupportedIsas().c_str());
    return 2;
  }
  HostAttention op(static_cast<int>(number("threads")), {}, isa);
  Pool pool{
      {0, number("kv_heads"), number("page"), number("head_dim"), dtypes.at(settings["dtype"])},
      nullptr};
  PoolShape& shape = pool.shape;
  const int64_t batch = number("batch"), context = number("context");
  const int64_t num_heads = shape.num_kv_heads * number("group");
  const int64_t max_pages = (context + shape.page_size - 1) / shape.page_size;
  const int64_t call_pages = batch * max_pages;
  const int64_t num_slices =
      std::max<int64_t>(2, number("pool_mib") * (1 << 20) / (call_pages * shape.page_bytes()));
  shape.num_pages = num_slices * call_pages;
  const int64_t pool_bytes = shape.num_pages * shape.page_bytes();
  pool.data = static_cast<char*>(std::aligned_alloc(2 << 20, (pool_bytes >> 21 << 21) + (2 << 20)));
  op.FirstTouch(pool.data, pool_bytes);

  std::vector<int32_t> page_ids(shape.num_pages);
  std::iota(page_ids.begin(), page_ids.end(), 0);
  std::shuffle(page_ids.begin(), page_ids.end(), std::mt19937(1));
  const std::vector<int32_t> lengths(batch, static_cast<int32_t>(context));
  const std::vector<uint16_t> q(batch * num_heads * shape.head_dim, 0x3c00);
  std::vector<uint16_t> out(q.size());
  std::vector<float> lse(batch * num_heads);

  // Both go through whole slices in turn until 100 ms have passed.
  int64_t attend_slice = 0, read_slice = num_slices / 2;
  const int64_t slice_bytes = call_pages * shape.page_bytes();
  const double kv_bytes =
      2.0 * batch * context * shape.num_kv_heads * shape.head_dim * SizeOf(shape.dtype);
  volatile uint64_t sink = 0;
  const auto attend = [&] {
    const Tables tables = {page_ids.data() + attend_slice * call_pages, lengths.data(), batch,
                           max_pages};
    op.Attend(pool, {q.data(), DType::kFloat16, num_heads * shape.head_dim}, num_heads,
              1 / std::sqrt(static_cast<float>(shape.head_dim)), tables, {out.data(), lse.data()});
    attend_slice = (attend_slice + 1) % num_slices;
    return kv_bytes;
  };
  const auto read = [&] {
    const char* data = pool.data + read_slice * slice_bytes;
    sink = sink + op.ReadAll(data, slice_bytes);
    read_slice = (read_slice + 1) % num_slices;
    return static_cast<double>(slice_bytes);
  };
  const auto rate = [&](auto&& call) {
    double bytes = 0;
    const double begin = Seconds();
    do bytes += call();
    while (Seconds() - begin < 0.1);
    return bytes / (Seconds() - begin) / 1e9;
  };
  std::vector<double> attend_rates, read_rates, quotients;
  for (int64_t round = 0; round < number("rounds"); ++round) {
    read_rates.push_back(rate(read));
    attend_rates.push_back(rate(attend));
    quotients.push_back(attend_rates.back() / read_rates.back());
  }
  std::printf(
      "%s %s page %lld threads %d batch %lld context %lld: attend %.2f GB/s (least %.2f), "
      "read %.2f GB/s, quotient %.3f\n",
      isa->name, settings["dtype"].c_str(), number("page"), op.num_threads(), number("batch"),
      number("context"), Median(attend_rates),
      *std::min_element(attend_rates.begin(), attend_rates.end()), Median(read_rates),
      Median(quotients));
  std::free(pool.data);
  return 0;
}

}  // namespace
}  // namespace apex

int main(int argc, char** argv) { return apex::Main(argc, argv); }
