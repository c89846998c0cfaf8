// The plain twin of the kernel: the same function in double, one loop after the other.

#ifndef APEX_JAX_CPU_OPS_REFERENCE_H_
#define APEX_JAX_CPU_OPS_REFERENCE_H_

#include <vector>

#include "attention.h"

namespace apex {

// The element of K (half 0) or V (half 1) that token `token` of a row has in the pool.
double ReferenceElement(const Pool& pool, const int32_t* pages, int64_t kv_head, int half,
                        int64_t token, int64_t dim);

// out_bnh and lse_bn of HostAttention::Attend.
void ReferenceAttend(const Pool& pool, const HeadRows& q, int64_t num_heads, double scale,
                     const Tables& tables, std::vector<double>* out_bnh,
                     std::vector<double>* lse_bn);

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_REFERENCE_H_
