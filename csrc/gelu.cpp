// gelu on the CPU; the maths is in dbkernels/ops/activations.py, the tensors in activation.h.
#include <torch/csrc/stable/library.h>

#include "activation.h"
#include "sigmoid.h"
#include "wide.h"

namespace dbkernels {
namespace {

constexpr float CUBIC = 0.044715f;
constexpr float SLOPE = 1.5957691216057308f;  // of 2 z at 0

inline float sigmoid_2z(float x) { return sigmoid(x * SLOPE * (x * x * CUBIC + 1.0f)); }

DBK_WIDE void forward_row(const float* h, const float* bias, int64_t F, float* u) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const float x = h[i] + bias[i];
    u[i] = x * sigmoid_2z(x);
  }
}

DBK_WIDE void backward_row(const float* h, const float* du, const float* bias, int64_t F,
                           float* dh, float* u, float* dbias) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const float x = h[i] + bias[i];
    const float s = sigmoid_2z(x);
    // from left to right: x * s * (1 - s) is 0 before x * x can be large
    const float slope = x * s * (1.0f - s) * (SLOPE + x * x * (3.0f * CUBIC * SLOPE));
    const float gradient = du[i] * (s + slope);
    dh[i] = gradient;
    dbias[i] += gradient;
    u[i] = x * s;
  }
}

void gelu_fwd(const Tensor& h, const std::optional<Tensor>& bias, const Tensor& u) {
  activation_fwd(h, bias, u, forward_row);
}

void gelu_bwd(const Tensor& h, const Tensor& du, const std::optional<Tensor>& bias,
              const Tensor& dh, const std::optional<Tensor>& u,
              const std::optional<Tensor>& dbias) {
  activation_bwd(h, du, bias, dh, u, dbias, backward_row);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&gelu_bwd));
}

}  // namespace dbkernels
