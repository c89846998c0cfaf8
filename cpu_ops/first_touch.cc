#include <cstring>

#include "attention.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace apex {
namespace {

constexpr int64_t kHugePage = 2 << 20;

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

}  // namespace apex
