// The instruction sets that the kernel is built for, and which of them this CPU runs.
//
// The translation units of the kernel (kernel_*.cc) hold nothing that runs unasked: their tables
// are constants, and whether a CPU can run them is decided here, in code built for any CPU.

#ifndef APEX_JAX_CPU_OPS_ISA_H_
#define APEX_JAX_CPU_OPS_ISA_H_

#include <string>

#include "chunk.h"

namespace apex {

extern const ChunkFunctions kAvx512Functions;
extern const AttendFunction kAvx512Bf16Attend;
extern const ChunkFunctions kAvx2Functions;
extern const ChunkFunctions kNeonFunctions;
extern const ChunkFunctions kPortableFunctions;

struct Isa {
  const char* name;
  ChunkFunctions functions;

  void Attend(const PoolShape& pool, const Chunk& chunk) const {
    functions.attend[static_cast<int>(pool.dtype)][pool.tile() == kWideTile ? 0 : 1](chunk);
  }
};

// The level called `name`, or the best one for ""; null if it is unknown or this CPU lacks it.
const Isa* FindIsa(const std::string& name);

// The levels that this CPU runs, best first, such as "avx512 avx2 portable".
std::string SupportedIsas();

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_ISA_H_
