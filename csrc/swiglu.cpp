// swiglu on the CPU; the maths is in dbkernels/ops/activations.py, the tensors in activation.h.
#include <torch/csrc/stable/library.h>

#include "activation.h"
#include "sigmoid.h"
#include "wide.h"

namespace dbkernels {
namespace {

DBK_WIDE void forward_row(const float* h, const float* bias, int64_t F, float* u) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const float a = h[i] + bias[i], b = h[F + i] + bias[F + i];
    u[i] = a * sigmoid(a) * b;
  }
}

DBK_WIDE void backward_row(const float* h, const float* du, const float* bias, int64_t F,
                           float* dh, float* u, float* dbias) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const float a = h[i] + bias[i], b = h[F + i] + bias[F + i];
    const float s = sigmoid(a), upstream = du[i];
    const float da = upstream * b * (s + a * s * (1.0f - s));
    const float db = upstream * (a * s);
    dh[i] = da;
    dh[F + i] = db;
    dbias[i] += da;
    dbias[F + i] += db;
    u[i] = a * s * b;
  }
}

void swiglu_fwd(const Tensor& h, const std::optional<Tensor>& bias, const Tensor& u) {
  activation_fwd(h, bias, u, forward_row);
}

void swiglu_bwd(const Tensor& h, const Tensor& du, const std::optional<Tensor>& bias,
                const Tensor& dh, const std::optional<Tensor>& u,
                const std::optional<Tensor>& dbias) {
  activation_bwd(h, du, bias, dh, u, dbias, backward_row);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd));
}

}  // namespace dbkernels
