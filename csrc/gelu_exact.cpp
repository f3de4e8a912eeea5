// gelu_exact on the CPU; the maths is in dbkernels/ops/activations.py, the tensors in activation.h.
#include <cmath>

#include <torch/csrc/stable/library.h>

#include "activation.h"
#include "sigmoid.h"
#include "wide.h"

namespace dbkernels {
namespace {

// 1 / sqrt(2 pi)
constexpr float DENSITY = 0.3989422804014327f;

// The distribution of the normal at x, and exp(-x^2 / 2), which is in both of its gradient's terms.
struct Normal {
  float distribution, bell;
};

// In the lower tail it is exp(-x^2 / 2) times a polynomial in t = 1 / (1 + SLOPE |x|), without the
// constant: nothing cancels there. Fitted to 4e-8 of the tail itself; NaN stays NaN.
inline Normal normal(float x) {
  constexpr float SLOPE = 0.27577164466275353f;
  const float bell = exponential(-0.5f * x * x);
  const float t = 1.0f / (1.0f + SLOPE * fabsf(x));
  float p = 2.5815847362265800e-2f;
  p = p * t - 1.0292226646583037e-1f;
  p = p * t + 1.1300267261668472e-1f;
  p = p * t - 1.7067042073771470e-2f;
  p = p * t + 7.5882900630056600e-2f;
  p = p * t + 8.3927733206566550e-2f;
  p = p * t + 1.0122627445284440e-1f;
  p = p * t + 1.1012451231389477e-1f;
  p = p * t + 1.1000933860860667e-1f;
  const float tail = p * t * bell;
  return {x < 0.0f ? tail : 1.0f - tail, bell};
}

DBK_WIDE void forward_row(const float* h, const float* bias, int64_t F, float* u) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const float x = h[i] + bias[i];
    u[i] = x * normal(x).distribution;
  }
}

DBK_WIDE void backward_row(const float* h, const float* du, const float* bias, int64_t F,
                           float* dh, float* u, float* dbias) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const float x = h[i] + bias[i];
    const Normal n = normal(x);
    const float gradient = du[i] * (n.distribution + x * n.bell * DENSITY);
    dh[i] = gradient;
    dbias[i] += gradient;
    u[i] = x * n.distribution;
  }
}

void gelu_exact_fwd(const Tensor& h, const std::optional<Tensor>& bias, const Tensor& u) {
  activation_fwd(h, bias, u, forward_row);
}

void gelu_exact_bwd(const Tensor& h, const Tensor& du, const std::optional<Tensor>& bias,
                    const Tensor& dh, const std::optional<Tensor>& u,
                    const std::optional<Tensor>& dbias) {
  activation_bwd(h, du, bias, dh, u, dbias, backward_row);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("gelu_exact_fwd", TORCH_BOX(&gelu_exact_fwd));
  m.impl("gelu_exact_bwd", TORCH_BOX(&gelu_exact_bwd));
}

}  // namespace dbkernels
