#include <cstring>

#include "attention.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace apex {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kCacheLineBytes = 64;

typedef uint64_t Words __attribute__((vector_size(16)));

// Asks for huge pages inside [data, data + num_bytes). Refusal costs speed, nothing else.
void PreferHugePages([[maybe_unused]] char* data, [[maybe_unused]] int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) & -kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

void HostAttention::FirstTouch(void* data, int64_t num_bytes) {
  char* bytes = static_cast<char*>(data);
  PreferHugePages(bytes, num_bytes);
  threads_.Run((num_bytes + kHugePage - 1) / kHugePage, [&](int64_t task) {
    const int64_t begin = task * kHugePage;
    std::memset(bytes + begin, 0, std::min(kHugePage, num_bytes - begin));
  });
}

uint64_t HostAttention::ReadAll(const void* data, int64_t num_bytes) {
  constexpr int64_t kTaskBytes = 256 << 10;  // what a chunk of 512 tokens reads
  const char* bytes = static_cast<const char*>(data);
  std::atomic<uint64_t> total{0};
  threads_.Run((num_bytes + kTaskBytes - 1) / kTaskBytes, [&](int64_t task) {
    const char* end = bytes + std::min(num_bytes, (task + 1) * kTaskBytes) - kCacheLineBytes;
    Words sums[4] = {};
    for (const char* line = bytes + task * kTaskBytes; line <= end; line += kCacheLineBytes) {
      for (int i = 0; i < 4; ++i) {
        Words words;
        std::memcpy(&words, line + i * sizeof words, sizeof words);
        sums[i] += words;
      }
    }
    const Words sum = sums[0] + sums[1] + sums[2] + sums[3];
    total += sum[0] + sum[1];
  });
  return total;
}

}  // namespace apex
