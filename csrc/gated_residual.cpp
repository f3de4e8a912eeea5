// gated_residual on the CPU; the maths is in dbkernels/ops/gated_residual.py and, for one row, in
// gate.h.
//
// x, h, y, dy, dh are (B, T, D) and contiguous, each of its own dtype; gate and dgate are (B, D)
// with any stride between samples. y may be x and dh may be h.
#include <torch/csrc/stable/library.h>

#include "gate.h"
#include "sums.h"

namespace dbkernels {
namespace {

void gated_residual_fwd(const Tensor& x, const Tensor& h, const Tensor& gate, const Tensor& y) {
  const int64_t D = x.size(2);
  const Cut cut(x.size(0), x.size(1));
  const Rows xs(x, D), hs(h, D), gates = rows_of_modulation(gate, D), ys(y, D);

  enum { GATE, X, H, Y, BUFFERS };
  cut.run(D, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    const float* gate_row = gates.load(task.sample, buffers[GATE]);
    for (int64_t row = task.first; row < task.last; ++row) {
      const float *x_row = xs.load(row, buffers[X]), *h_row = hs.load(row, buffers[H]);
      float* y_row = ys.place(row, buffers[Y]);

      add_gated(x_row, h_row, gate_row, D, y_row);

      ys.store(row, y_row);
    }
  });
}

void gated_residual_bwd(const Tensor& dy, const Tensor& h, const Tensor& gate, const Tensor& dh,
                        const Tensor& dgate) {
  const int64_t D = dy.size(2);
  const Cut cut(dy.size(0), dy.size(1));
  const Rows dys(dy, D), hs(h, D), gates = rows_of_modulation(gate, D), dhs(dh, D);
  const SampleSums<1> sums(cut, D, dy, {rows_of_modulation(dgate, D)});

  enum { GATE, DY, H, DH, SUMS, BUFFERS = SUMS + TaskSums<1>::BUFFERS };
  cut.run(D, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    TaskSums<1> own(buffers, SUMS, D);
    const float* gate_row = gates.load(task.sample, buffers[GATE]);
    for (int64_t row = task.first; row < task.last; ++row) {
      const float *dy_row = dys.load(row, buffers[DY]), *h_row = hs.load(row, buffers[H]);
      float* dh_row = dhs.place(row, buffers[DH]);

      gate_backward(dy_row, h_row, gate_row, D, dh_row, own[0]);
      own.count_row();

      dhs.store(row, dh_row);
    }
    sums.write(task, own.finish());
  });
  sums.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("gated_residual_fwd", TORCH_BOX(&gated_residual_fwd));
  m.impl("gated_residual_bwd", TORCH_BOX(&gated_residual_bwd));
}

}  // namespace dbkernels
