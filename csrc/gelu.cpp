// gelu on the CPU; the maths is in dbkernels/ops/activations.py.
//
// h, u, du, dh are (N, F) and contiguous, each of its own dtype, bias and dbias (F,). dh may be h
// and u may be du: elements are read before they are written.
#include <torch/csrc/stable/library.h>

#include "sigmoid.h"
#include "sums.h"
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
  const int64_t N = h.size(0), F = h.size(1);
  const Rows hs(h, F), biases(bias, F), us(u, F);

  enum { BIAS, H, U, BUFFERS };
  Cut(1, N).run(F, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    const float* bias_row = biases.load_or(0.0f, buffers[BIAS]);
    for (int64_t row = task.first; row < task.last; ++row) {
      float* u_row = us.place(row, buffers[U]);
      forward_row(hs.load(row, buffers[H]), bias_row, F, u_row);
      us.store(row, u_row);
    }
  });
}

void gelu_bwd(const Tensor& h, const Tensor& du, const std::optional<Tensor>& bias,
              const Tensor& dh, const std::optional<Tensor>& u,
              const std::optional<Tensor>& dbias) {
  const int64_t N = h.size(0), F = h.size(1);
  const Cut cut(1, N);
  const Rows hs(h, F), dus(du, F), biases(bias, F), dhs(dh, F), us(u, F);
  const SampleSums<1> sums(cut, F, h, {Rows(dbias, F)});

  enum { BIAS, H, DU, DH, U, SUMS, BUFFERS = SUMS + TaskSums<1>::BUFFERS };
  cut.run(F, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    TaskSums<1> own(buffers, SUMS, F);
    const float* bias_row = biases.load_or(0.0f, buffers[BIAS]);
    for (int64_t row = task.first; row < task.last; ++row) {
      const float *h_row = hs.load(row, buffers[H]), *du_row = dus.load(row, buffers[DU]);
      float *dh_row = dhs.place(row, buffers[DH]), *u_row = us.place(row, buffers[U]);

      backward_row(h_row, du_row, bias_row, F, dh_row, u_row, own[0]);
      own.count_row();

      dhs.store(row, dh_row);
      us.store(row, u_row);
    }
    sums.write(task, own.finish());
  });
  sums.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&gelu_bwd));
}

}  // namespace dbkernels
