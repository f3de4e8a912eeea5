// gated_adaln_norm on the CPU; the maths is in dbkernels/ops/gated_adaln_norm.py and, for one row,
// in gate.h and norm.h.
//
// x, h, x1, y, dy, dx1, dx, dh are (B, T, D) and contiguous, each of its own dtype, stats
// (B, T, 2) float32; gate, scale, shift and their gradients are (B, D) with any stride between
// samples. dh may be h and y may be dy.
#include <torch/csrc/stable/library.h>

#include "gate.h"
#include "norm.h"
#include "sums.h"

namespace dbkernels {
namespace {

void gated_adaln_norm_fwd(const Tensor& x, const Tensor& h, const Tensor& gate,
                          const Tensor& scale, const Tensor& shift,
                          const std::optional<Tensor>& x1, const Tensor& y, const Tensor& stats,
                          double eps, bool centred) {
  const int64_t D = x.size(2);
  const Cut cut(x.size(0), x.size(1));
  const Rows xs(x, D), hs(h, D), x1s(x1, D), ys(y, D), gates = rows_of_modulation(gate, D);
  const Rows scales = rows_of_modulation(scale, D), shifts = rows_of_modulation(shift, D);
  auto* saved = static_cast<Stats*>(stats.data_ptr());

  enum { GATE, WEIGHT, SHIFT, X, H, X1, Y, BUFFERS };
  cut.run(D, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    const float* gate_row = gates.load(task.sample, buffers[GATE]);
    weight_of(scales.load(task.sample, buffers[WEIGHT]), D, buffers[WEIGHT]);
    const float* shift_row = shifts.load(task.sample, buffers[SHIFT]);
    for (int64_t row = task.first; row < task.last; ++row) {
      const float *x_row = xs.load(row, buffers[X]), *h_row = hs.load(row, buffers[H]);
      float *x1_row = x1s.place(row, buffers[X1]), *y_row = ys.place(row, buffers[Y]);

      add_gated(x_row, h_row, gate_row, D, x1_row);
      saved[row] = statistics(x1_row, D, static_cast<float>(eps), centred);
      modulate(x1_row, saved[row], buffers[WEIGHT], shift_row, D, y_row);

      x1s.store(row, x1_row);
      ys.store(row, y_row);
    }
  });
}

void gated_adaln_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dx1, const Tensor& x,
                          const Tensor& h, const Tensor& gate, const Tensor& scale,
                          const Tensor& shift, const Tensor& stats, const Tensor& dx,
                          const Tensor& dh, const std::optional<Tensor>& y, const Tensor& dgate,
                          const Tensor& dscale, const Tensor& dshift, bool centred) {
  const int64_t D = x.size(2);
  const Cut cut(x.size(0), x.size(1));
  const Rows dys(dy, D), dx1s(dx1, D), xs(x, D), hs(h, D), dxs(dx, D), dhs(dh, D), ys(y, D);
  const Rows gates = rows_of_modulation(gate, D);
  const Rows scales = rows_of_modulation(scale, D), shifts = rows_of_modulation(shift, D);
  const SampleSums<3> sums(cut, D, x,
                           {rows_of_modulation(dscale, D), rows_of_modulation(dshift, D),
                            rows_of_modulation(dgate, D)});
  const auto* saved = static_cast<const Stats*>(stats.data_ptr());

  enum { GATE, WEIGHT, SHIFT, DY, DX1, X, H, X_HAT, DX, DH, Y, SUMS };
  cut.run(D, SUMS + TaskSums<3>::BUFFERS, [&](const Task& task, const Buffers& buffers) {
    TaskSums<3> own(buffers, SUMS, D);
    const float* gate_row = gates.load(task.sample, buffers[GATE]);
    weight_of(scales.load(task.sample, buffers[WEIGHT]), D, buffers[WEIGHT]);
    const float *weight = buffers[WEIGHT], *x_hat = buffers[X_HAT];
    const float* shift_row = ys ? shifts.load(task.sample, buffers[SHIFT]) : nullptr;
    for (int64_t row = task.first; row < task.last; ++row) {
      const float *x_row = xs.load(row, buffers[X]), *h_row = hs.load(row, buffers[H]);
      const float* dy_row = dys.load(row, buffers[DY]);
      const float* dx1_row = dx1s ? dx1s.load(row, buffers[DX1]) : nullptr;
      float *dx_row = dxs.place(row, buffers[DX]), *dh_row = dhs.place(row, buffers[DH]);
      float* y_row = ys.place(row, buffers[Y]);

      // x1, until x_hat is written over it
      add_gated(x_row, h_row, gate_row, D, buffers[X_HAT]);
      const Means means = backward_means(
          dy_row, x_hat, saved[row], weight, D, centred, buffers[X_HAT], own[0], own[1]);
      backward_row(dy_row, dx1_row, x_hat, saved[row].rstd, means, weight, D, dx_row);
      gate_backward(dx_row, h_row, gate_row, D, dh_row, own[2]);
      own.count_row();
      dxs.store(row, dx_row);
      dhs.store(row, dh_row);

      if (ys) {
        modulate_again(x_hat, weight, shift_row, D, y_row);
        ys.store(row, y_row);
      }
    }
    sums.write(task, own.finish());
  });
  sums.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("gated_adaln_norm_fwd", TORCH_BOX(&gated_adaln_norm_fwd));
  m.impl("gated_adaln_norm_bwd", TORCH_BOX(&gated_adaln_norm_bwd));
}

}  // namespace dbkernels
