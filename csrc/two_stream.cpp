// two_stream on the CPU; the maths is in dbkernels/ops/two_stream.py.
//
// A row is one token of the noisy stream, H heads of d elements. Rows of q, k and v lie apart by
// their strides; all others are (B * T, H, d), each of its own dtype and contiguous. logsumexp is
// (B, H, T or more) float32. out may be o, and dq may be dq_clean.
#include <cmath>

#include <torch/csrc/stable/library.h>

#include "rows.h"
#include "wide.h"

namespace dbkernels {
namespace {

// Where the numbers of one head of a token lie.
class Logsumexp {
 public:
  Logsumexp(const Tensor& tensor, int64_t rows)
      : data_(static_cast<float*>(tensor.data_ptr())), T_(rows / tensor.size(0)),
        H_(tensor.size(1)), stride_(tensor.size(2)) {}

  float& at(int64_t row, int64_t head) const {
    return data_[(row / T_ * H_ + head) * stride_ + row % T_];
  }

 private:
  float* data_;
  int64_t T_, H_, stride_;
};

Rows rows_apart(const Tensor& tensor, int64_t D) { return Rows(tensor, D, tensor.stride(0)); }

DBK_WIDE float dot(const float* x, const float* y, int64_t d) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) sum += x[i] * y[i];
  return sum;
}

DBK_WIDE void mix(const float* o, float rest, const float* v, float share, int64_t d, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) out[i] = rest * o[i] + share * v[i];
}

// sum of dout * (v - out)
DBK_WIDE float dot_of_difference(const float* dout, const float* v, const float* out, int64_t d) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) sum += dout[i] * (v[i] - out[i]);
  return sum;
}

DBK_WIDE void gradients(const float* dout, const float* q, const float* k, const float* dq_clean,
                        float share, float ds, int64_t d, float* dq, float* dk, float* dv) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) {
    dq[i] = dq_clean[i] + ds * k[i];
    dk[i] = ds * q[i];
    dv[i] = share * dout[i];
  }
}

float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void two_stream_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                    const Tensor& out, const Tensor& logsumexp) {
  const int64_t rows = q.size(0), H = q.size(1), d = q.size(2), D = H * d;
  const Rows qs = rows_apart(q, D), ks = rows_apart(k, D), vs = rows_apart(v, D);
  const Rows os(o, D), outs(out, D);
  const Logsumexp sums(logsumexp, rows);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));

  enum { Q, K, V, O, OUT, BUFFERS };
  Cut(1, rows).run(D, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    for (int64_t row = task.first; row < task.last; ++row) {
      const float *q_row = qs.load(row, buffers[Q]), *k_row = ks.load(row, buffers[K]);
      const float *v_row = vs.load(row, buffers[V]), *o_row = os.load(row, buffers[O]);
      float* out_row = outs.place(row, buffers[OUT]);

      for (int64_t head = 0; head < H; ++head) {
        const int64_t at = head * d;
        float& sum = sums.at(row, head);
        const float own = scale * dot(q_row + at, k_row + at, d), of_clean = sum;
        // not by the merged logsumexp, which is rounded: both shares add up to 1
        const float rest = sigmoid_of(of_clean - own), share = sigmoid_of(own - of_clean);
        mix(o_row + at, rest, v_row + at, share, d, out_row + at);
        sum = std::fmax(own, of_clean) + std::log1p(std::exp(-std::fabs(own - of_clean)));
      }

      outs.store(row, out_row);
    }
  });
}

void two_stream_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& out, const Tensor& logsumexp, const Tensor& dq_clean,
                    const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const int64_t rows = q.size(0), H = q.size(1), d = q.size(2), D = H * d;
  const Rows qs = rows_apart(q, D), ks = rows_apart(k, D), vs = rows_apart(v, D);
  const Rows douts(dout, D), outs(out, D), dqs_clean(dq_clean, D);
  const Rows dqs(dq, D), dks(dk, D), dvs(dv, D);
  const Logsumexp sums(logsumexp, rows);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));

  enum { DOUT, Q, K, V, OUT, DQ_CLEAN, DQ, DK, DV, BUFFERS };
  Cut(1, rows).run(D, BUFFERS, [&](const Task& task, const Buffers& buffers) {
    for (int64_t row = task.first; row < task.last; ++row) {
      const float *q_row = qs.load(row, buffers[Q]), *k_row = ks.load(row, buffers[K]);
      const float *v_row = vs.load(row, buffers[V]), *out_row = outs.load(row, buffers[OUT]);
      const float* dout_row = douts.load(row, buffers[DOUT]);
      const float* dq_clean_row = dqs_clean.load(row, buffers[DQ_CLEAN]);
      float *dq_row = dqs.place(row, buffers[DQ]), *dk_row = dks.place(row, buffers[DK]);
      float* dv_row = dvs.place(row, buffers[DV]);

      for (int64_t head = 0; head < H; ++head) {
        const int64_t at = head * d;
        const float own = scale * dot(q_row + at, k_row + at, d);
        const float share = std::exp(own - sums.at(row, head));
        const float sum = dot_of_difference(dout_row + at, v_row + at, out_row + at, d);
        gradients(dout_row + at, q_row + at, k_row + at, dq_clean_row + at, share,
                  scale * share * sum, d, dq_row + at, dk_row + at, dv_row + at);
      }

      dqs.store(row, dq_row);
      dks.store(row, dk_row);
      dvs.store(row, dv_row);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("two_stream_fwd", TORCH_BOX(&two_stream_fwd));
  m.impl("two_stream_bwd", TORCH_BOX(&two_stream_bwd));
}

}  // namespace dbkernels
