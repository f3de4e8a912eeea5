// An activation over rows on the CPU: gelu, gelu_exact and swiglu are loops over one row each.
//
// h and dh are (N, width), u and du (N, F), contiguous, each of its own dtype, bias and dbias
// (width,); width is F, or 2 F where one half of a row gates the other. dh may be h and u may be
// du: elements are read before they are written.
#pragma once

#include "sums.h"

namespace dbkernels {

// forward_row(h, bias, F, u)
template <typename Row>
void activation_fwd(const Tensor& h, const std::optional<Tensor>& bias, const Tensor& u,
                    const Row& forward_row) {
  const int64_t N = h.size(0), width = h.size(1), F = u.size(1);
  const Rows hs(h, width), biases(bias, width), us(u, F);

  enum { BIAS, H, U, BUFFERS };
  Cut(1, N).run(width, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    const float* bias_row = biases.load_or(0.0f, buffers[BIAS]);
    for (int64_t row = task.first; row < task.last; ++row) {
      float* u_row = us.place(row, buffers[U]);
      forward_row(hs.load(row, buffers[H]), bias_row, F, u_row);
      us.store(row, u_row);
    }
  });
}

// backward_row(h, du, bias, F, dh, u, dbias), which adds to dbias
template <typename Row>
void activation_bwd(const Tensor& h, const Tensor& du, const std::optional<Tensor>& bias,
                    const Tensor& dh, const std::optional<Tensor>& u,
                    const std::optional<Tensor>& dbias, const Row& backward_row) {
  const int64_t N = h.size(0), width = h.size(1), F = du.size(1);
  const Cut cut(1, N);
  const Rows hs(h, width), dus(du, F), biases(bias, width), dhs(dh, width), us(u, F);
  const SampleSums<1> sums(cut, width, h, {Rows(dbias, width)});

  enum { BIAS, H, DU, DH, U, SUMS, BUFFERS = SUMS + TaskSums<1>::BUFFERS };
  cut.run(width, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    TaskSums<1> own(buffers, SUMS, width);
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

}  // namespace dbkernels
