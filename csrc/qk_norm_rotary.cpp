// qk_norm_rotary on the CPU; the maths is in dbkernels/ops/qk_norm_rotary.py.
//
// A row is the queries and keys of one token, (2, H, d): the first two thirds of qkv and dqkv
// (B, T, 3 H d), all of qk (B, T, 2, H, d), each of its own dtype and contiguous. Weights and their
// gradients are (d,), the table of cosines and sines (2, T, d) float32. dqkv is worked on in place.
#include <torch/csrc/stable/library.h>

#include "norm.h"
#include "sums.h"
#include "wide.h"

namespace dbkernels {
namespace {

// Cosines and sines of one token, by the first half; null where nothing is turned.
struct Angles {
  const float *cos = nullptr, *sin = nullptr;
};

class Table {
 public:
  Table(const std::optional<Tensor>& rotary, int64_t T, int64_t d) : T_(T), d_(d) {
    if (rotary) data_ = static_cast<const float*>(rotary->data_ptr());
  }

  Angles operator[](int64_t row) const {
    if (data_ == nullptr) return {};
    const float* cos = data_ + row % T_ * d_;
    return {cos, cos + T_ * d_};
  }

 private:
  const float* data_ = nullptr;
  int64_t T_, d_;
};

// by the angles, or the other way where way is -1
DBK_WIDE void turn(float* x, Angles angles, float way, int64_t d) {
  if (angles.cos == nullptr) return;
  const int64_t half = d / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i], sin = way * angles.sin[i];
    x[i] = a * angles.cos[i] - b * sin;
    x[half + i] = b * angles.cos[i] + a * sin;
  }
}

DBK_WIDE void scale_head(const float* x, float rstd, const float* weight, int64_t d, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) y[i] = x[i] * rstd * weight[i];
}

// dx over g
DBK_WIDE void norm_backward(
    float* g, const float* x, float rstd, const float* weight, int64_t d, float* dweight) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) {
    const float x_hat = x[i] * rstd;
    dweight[i] += g[i] * x_hat;
    sum += weight[i] * g[i] * x_hat;
  }
  const float mean = sum / d;
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) g[i] = rstd * (weight[i] * g[i] - x[i] * rstd * mean);
}

void qk_norm_rotary_fwd(const Tensor& qkv, const std::optional<Tensor>& q_weight,
                        const std::optional<Tensor>& k_weight,
                        const std::optional<Tensor>& rotary, const Tensor& qk, int64_t heads,
                        double eps) {
  const int64_t T = qkv.size(1), H = heads, d = qkv.size(2) / (3 * H), D = 2 * H * d;
  const Rows xs(qkv, D, 3 * H * d), ys(qk, D), weights[] = {{q_weight, d}, {k_weight, d}};
  const Table table(rotary, T, d);

  enum { WEIGHTS, X = 2, Y, BUFFERS };
  Cut(1, qkv.size(0) * T).run(D, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    const float* weight[] = {weights[0].load_or(1.0f, buffers[WEIGHTS]),
                             weights[1].load_or(1.0f, buffers[WEIGHTS + 1])};
    for (int64_t row = task.first; row < task.last; ++row) {
      const float* x_row = xs.load(row, buffers[X]);
      float* y_row = ys.place(row, buffers[Y]);

      for (int64_t head = 0; head < 2 * H; ++head) {
        const float* x = x_row + head * d;
        float *y = y_row + head * d, eps_ = static_cast<float>(eps);
        const float rstd = weights[0] ? statistics(x, d, eps_, false).rstd : 1.0f;
        scale_head(x, rstd, weight[head / H], d, y);
        turn(y, table[row], 1.0f, d);
      }

      ys.store(row, y_row);
    }
  });
}

void qk_norm_rotary_bwd(const Tensor& dqkv, const std::optional<Tensor>& qkv,
                        const std::optional<Tensor>& q_weight,
                        const std::optional<Tensor>& k_weight,
                        const std::optional<Tensor>& rotary,
                        const std::optional<Tensor>& dq_weight,
                        const std::optional<Tensor>& dk_weight, int64_t heads, double eps) {
  const int64_t T = dqkv.size(1), H = heads, d = dqkv.size(2) / (3 * H), D = 2 * H * d;
  const Cut cut(1, dqkv.size(0) * T);
  const Rows xs = q_weight ? Rows(*qkv, D, 3 * H * d) : Rows(std::nullopt, D);
  const Rows dxs(dqkv, D, 3 * H * d), weights[] = {{q_weight, d}, {k_weight, d}};
  const Table table(rotary, T, d);
  const SampleSums<2> sums(cut, d, dqkv, {Rows(dq_weight, d), Rows(dk_weight, d)});

  enum { WEIGHTS, X = 2, DX, SUMS, BUFFERS = SUMS + TaskSums<2>::BUFFERS };
  cut.run(D, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    TaskSums<2> own(buffers, SUMS, d);
    const float* weight[] = {weights[0].load_or(1.0f, buffers[WEIGHTS]),
                             weights[1].load_or(1.0f, buffers[WEIGHTS + 1])};
    for (int64_t row = task.first; row < task.last; ++row) {
      const float* x_row = xs ? xs.load(row, buffers[X]) : nullptr;
      float* dx_row = dxs.load_in_place(row, buffers[DX]);

      for (int64_t head = 0; head < 2 * H; ++head) {
        float* dx = dx_row + head * d;
        turn(dx, table[row], -1.0f, d);
        if (!xs) continue;
        const float* x = x_row + head * d;
        const float rstd = statistics(x, d, static_cast<float>(eps), false).rstd;
        norm_backward(dx, x, rstd, weight[head / H], d, own[head / H]);
      }
      own.count_row();

      dxs.store(row, dx_row);
    }
    sums.write(task, own.finish());
  });
  sums.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("qk_norm_rotary_fwd", TORCH_BOX(&qk_norm_rotary_fwd));
  m.impl("qk_norm_rotary_bwd", TORCH_BOX(&qk_norm_rotary_bwd));
}

}  // namespace dbkernels
