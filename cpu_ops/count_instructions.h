// How many instructions a function executes, found by stepping through it: exact, and there where
// hardware counters are not, as in most virtual machines. A million take some ten seconds.

#ifndef APEX_JAX_CPU_OPS_COUNT_INSTRUCTIONS_H_
#define APEX_JAX_CPU_OPS_COUNT_INSTRUCTIONS_H_

#include <cstdint>
#include <functional>

namespace apex {

// Runs body in a copy of this process, which has the calling thread alone. -1 where the system
// does not let processes be traced.
int64_t CountInstructions(const std::function<void()>& body);

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_COUNT_INSTRUCTIONS_H_
