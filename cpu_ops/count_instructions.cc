#include "count_instructions.h"

#if defined(__linux__)
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#endif

namespace apex {

#if defined(__linux__)
namespace {

int64_t Step(const std::function<void()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(1);
    raise(SIGSTOP);
    body();
    _exit(0);
  }
  int status = 0;
  int64_t count = 0;
  if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return -1;
  while (WIFSTOPPED(status)) {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) return -1;
    if (waitpid(child, &status, 0) != child) return -1;
    ++count;
  }
  return count;
}

}  // namespace

int64_t CountInstructions(const std::function<void()>& body) {
  const int64_t count = Step(body), around = Step([] {});
  return count < 0 || around < 0 ? -1 : count - around;
}

#else

int64_t CountInstructions(const std::function<void()>&) { return -1; }

#endif

}  // namespace apex
