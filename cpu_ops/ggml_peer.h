// ggml's flash attention (llama.cpp's) as a contestant of the benchmark: the same shape, the same
// memory. Built only where CMake is told of a built ggml.

#ifndef APEX_JAX_CPU_OPS_GGML_PEER_H_
#define APEX_JAX_CPU_OPS_GGML_PEER_H_

#include <cstdint>
#include <memory>

#include "dtypes.h"

namespace apex {

struct GgmlShape {
  int64_t num_heads, num_kv_heads, head_dim, context, batch;
  DType dtype;
};

class GgmlPeer {
 public:
  // token_major: a token's heads are neighbours, as in llama.cpp's cache; otherwise a head's tokens
  // are, which ggml reads faster.
  GgmlPeer(const GgmlShape& shape, bool token_major, int num_threads);
  ~GgmlPeer();

  // One decode step over the KV at kv, keys before values, both contiguous.
  void Attend(char* kv);

 private:
  struct Graph;
  std::unique_ptr<Graph> graph_;
};

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_GGML_PEER_H_
