// swiglu on the CPU; the maths is in dbkernels/ops/activations.py.
//
// h and dh are (N, 2 F), u and du (N, F), contiguous, each of its own dtype, bias and dbias (2 F,).
// dh may be h and u may be du: elements are read before they are written.
#include <torch/csrc/stable/library.h>

#include "sigmoid.h"
#include "sums.h"
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
  const int64_t N = u.size(0), F = u.size(1);
  const Rows hs(h, 2 * F), biases(bias, 2 * F), us(u, F);

  enum { BIAS, H, U, BUFFERS };
  Cut(1, N).run(2 * F, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    const float* bias_row = biases.load_or(0.0f, buffers[BIAS]);
    for (int64_t row = task.first; row < task.last; ++row) {
      float* u_row = us.place(row, buffers[U]);
      forward_row(hs.load(row, buffers[H]), bias_row, F, u_row);
      us.store(row, u_row);
    }
  });
}

void swiglu_bwd(const Tensor& h, const Tensor& du, const std::optional<Tensor>& bias,
                const Tensor& dh, const std::optional<Tensor>& u,
                const std::optional<Tensor>& dbias) {
  const int64_t N = du.size(0), F = du.size(1);
  const Cut cut(1, N);
  const Rows hs(h, 2 * F), dus(du, F), biases(bias, 2 * F), dhs(dh, 2 * F), us(u, F);
  const SampleSums<1> sums(cut, 2 * F, h, {Rows(dbias, 2 * F)});

  enum { BIAS, H, DU, DH, U, SUMS, BUFFERS = SUMS + TaskSums<1>::BUFFERS };
  cut.run(2 * F, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    TaskSums<1> own(buffers, SUMS, 2 * F);
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
  m.impl("swiglu_fwd", TORCH_BOX(&swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd));
}

}  // namespace dbkernels
