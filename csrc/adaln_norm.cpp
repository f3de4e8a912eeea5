// adaln_norm on the CPU; the maths is in dbkernels/ops/adaln_norm.py and, for one row, in norm.h.
//
// x, y, dy, dres, dx are (B, T, D) and contiguous, each of its own dtype, stats (B, T, 2) float32;
// scale, shift and their gradients are (B, D) with any stride between samples. y may be dy.
#include <torch/csrc/stable/library.h>

#include "norm.h"
#include "sums.h"

namespace dbkernels {
namespace {

void adaln_norm_fwd(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& y,
                    const Tensor& stats, double eps, bool centred) {
  const int64_t D = x.size(2);
  const Cut cut(x.size(0), x.size(1));
  const Rows xs(x, D), ys(y, D);
  const Rows scales = rows_of_modulation(scale, D), shifts = rows_of_modulation(shift, D);
  auto* saved = static_cast<Stats*>(stats.data_ptr());

  enum { WEIGHT, SHIFT, X, Y, BUFFERS };
  cut.run(D, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    weight_of(scales.load(task.sample, buffers[WEIGHT]), D, buffers[WEIGHT]);
    const float* shift_row = shifts.load(task.sample, buffers[SHIFT]);
    for (int64_t row = task.first; row < task.last; ++row) {
      const float* x_row = xs.load(row, buffers[X]);
      float* y_row = ys.place(row, buffers[Y]);

      saved[row] = statistics(x_row, D, static_cast<float>(eps), centred);
      modulate(x_row, saved[row], buffers[WEIGHT], shift_row, D, y_row);

      ys.store(row, y_row);
    }
  });
}

void adaln_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dres, const Tensor& x,
                    const Tensor& scale, const Tensor& shift, const Tensor& stats,
                    const Tensor& dx, const std::optional<Tensor>& y, const Tensor& dscale,
                    const Tensor& dshift, bool centred) {
  const int64_t D = x.size(2);
  const Cut cut(x.size(0), x.size(1));
  const Rows dys(dy, D), dress(dres, D), xs(x, D), dxs(dx, D), ys(y, D);
  const Rows scales = rows_of_modulation(scale, D), shifts = rows_of_modulation(shift, D);
  const SampleSums<2> sums(
      cut, D, x, {rows_of_modulation(dscale, D), rows_of_modulation(dshift, D)});
  const auto* saved = static_cast<const Stats*>(stats.data_ptr());

  enum { WEIGHT, SHIFT, DY, DRES, X, X_HAT, DX, Y, SUMS, BUFFERS = SUMS + TaskSums<2>::BUFFERS };
  cut.run(D, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    TaskSums<2> own(buffers, SUMS, D);
    weight_of(scales.load(task.sample, buffers[WEIGHT]), D, buffers[WEIGHT]);
    const float *weight = buffers[WEIGHT], *x_hat = buffers[X_HAT];
    const float* shift_row = ys ? shifts.load(task.sample, buffers[SHIFT]) : nullptr;
    for (int64_t row = task.first; row < task.last; ++row) {
      const float* dy_row = dys.load(row, buffers[DY]);
      const float* x_row = xs.load(row, buffers[X]);
      const float* dres_row = dress ? dress.load(row, buffers[DRES]) : nullptr;
      float *dx_row = dxs.place(row, buffers[DX]), *y_row = ys.place(row, buffers[Y]);

      const Means means = backward_means(
          dy_row, x_row, saved[row], weight, D, centred, buffers[X_HAT], own[0], own[1]);
      backward_row(dy_row, dres_row, x_hat, saved[row].rstd, means, weight, D, dx_row);
      own.count_row();
      dxs.store(row, dx_row);

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
  m.impl("adaln_norm_fwd", TORCH_BOX(&adaln_norm_fwd));
  m.impl("adaln_norm_bwd", TORCH_BOX(&adaln_norm_bwd));
}

}  // namespace dbkernels
