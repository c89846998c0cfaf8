#include "ggml_peer.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

namespace apex {
namespace {

ggml_type TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return GGML_TYPE_F16;
    case DType::kBFloat16:
      return GGML_TYPE_BF16;
    case DType::kFloat32:
      break;
  }
  return GGML_TYPE_F32;
}

}  // namespace

struct GgmlPeer::Graph {
  ggml_context* context;
  ggml_tensor *keys, *values;  // views move their source's data with them
  int64_t half_bytes;
  std::vector<float> q, out;
  ggml_cgraph* graph;
  ggml_threadpool* threads;
  ggml_cplan plan;
  std::vector<uint8_t> work;
};

GgmlPeer::GgmlPeer(const GgmlShape& shape, bool token_major, int num_threads)
    : graph_(std::make_unique<Graph>()) {
  Graph& g = *graph_;
  g.context = ggml_init({1 << 20, nullptr, /*no_alloc=*/true});
  const auto new_half = [&] {
    // Dimensions in ggml's order, the fastest first; permuted, not copied, to [h, s, k, b].
    return token_major ? ggml_new_tensor_4d(g.context, TypeOf(shape.dtype), shape.head_dim,
                                            shape.num_kv_heads, shape.context, shape.batch)
                       : ggml_new_tensor_4d(g.context, TypeOf(shape.dtype), shape.head_dim,
                                            shape.context, shape.num_kv_heads, shape.batch);
  };
  g.keys = new_half();
  g.values = new_half();
  g.half_bytes = static_cast<int64_t>(ggml_nbytes(g.keys));
  if (token_major) {
    g.keys = ggml_permute(g.context, g.keys, 0, 2, 1, 3);
    g.values = ggml_permute(g.context, g.values, 0, 2, 1, 3);
  }
  ggml_tensor* q = ggml_new_tensor_4d(g.context, GGML_TYPE_F32, shape.head_dim, 1, shape.num_heads,
                                      shape.batch);
  g.q.assign(shape.head_dim * shape.num_heads * shape.batch, 1.0f);
  g.out.resize(g.q.size());
  q->data = g.q.data();
  const float scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
  ggml_tensor* out = ggml_flash_attn_ext(g.context, q, g.keys, g.values, nullptr, scale, 0, 0);
  out->data = g.out.data();
  g.graph = ggml_new_graph(g.context);
  ggml_build_forward_expand(g.graph, out);
  ggml_threadpool_params params = ggml_threadpool_params_default(num_threads);
  g.threads = ggml_threadpool_new(&params);
  g.plan = ggml_graph_plan(g.graph, num_threads, g.threads);
  g.work.resize(g.plan.work_size);
  g.plan.work_data = g.work.data();
}

GgmlPeer::~GgmlPeer() {
  ggml_threadpool_free(graph_->threads);
  ggml_free(graph_->context);
}

void GgmlPeer::Attend(char* kv) {
  graph_->keys->data = kv;
  graph_->values->data = kv + graph_->half_bytes;
  if (ggml_graph_compute(graph_->graph, &graph_->plan) != GGML_STATUS_SUCCESS) {
    std::fprintf(stderr, "ggml failed\n");
    std::exit(1);
  }
}

}  // namespace apex
