// The gated residual of one row; see gate.h.
#include "gate.h"

#include "wide.h"

namespace dbkernels {

DBK_WIDE void add_gated(
    const float* x, const float* h, const float* gate, int64_t D, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) y[i] = x[i] + gate[i] * h[i];
}

DBK_WIDE void gate_backward(
    const float* dy, const float* h, const float* gate, int64_t D, float* dh, float* dgate) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) {
    dgate[i] += dy[i] * h[i];
    dh[i] = gate[i] * dy[i];
  }
}

}  // namespace dbkernels
