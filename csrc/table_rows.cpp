// table_rows on the CPU; the maths is in dbkernels/ops/table_rows.py.
//
// table and dtable are (V, D), y and dy (N, D), all contiguous and of one dtype; index, rows and
// tokens are (N,) int64, and every index is a row of the table. A row's tokens are added in their
// order by one thread, which owns that row of dtable, so any number of threads gives the same bits.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "sums.h"
#include "wide.h"

namespace dbkernels {
namespace {

constexpr float EPS = 1e-12f;  // the least length that a row is divided by

DBK_WIDE float dot(const float* a, const float* b, int64_t D) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < D; ++i) total += a[i] * b[i];
  return total;
}

DBK_WIDE void scale(const float* x, float factor, int64_t D, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) y[i] = x[i] * factor;
}

// dw = inverse * (total - along * w), over total
DBK_WIDE void across(const float* w, float along, float inverse, int64_t D, float* total) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) total[i] = inverse * (total[i] - along * w[i]);
}

void unit_backward(const float* w, int64_t D, float* total) {
  const float length = std::sqrt(dot(w, w, D)), inverse = 1.0f / std::max(length, EPS);
  const float along = length >= EPS ? inverse * dot(w, total, D) * inverse : 0.0f;
  across(w, along, inverse, D, total);
}

// of a contiguous tensor with rows of so many bytes
char* row_at(const Tensor& tensor, int64_t row, int64_t bytes) {
  return static_cast<char*>(tensor.data_ptr()) + row * bytes;
}

int64_t row_bytes(const Tensor& tensor) {
  return tensor.size(1) * (tensor.scalar_type() == ScalarType::Float ? sizeof(float) : 2);
}

const int64_t* integers(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.data_ptr());
}

void table_rows_fwd(const Tensor& index, const Tensor& table, bool unit, const Tensor& y) {
  const int64_t N = index.numel(), D = table.size(1), bytes = row_bytes(table);
  const Rows tables(table, D), ys(y, D);
  const int64_t* indices = integers(index);

  enum { Y, BUFFERS };
  const int64_t grain = std::max<int64_t>(GRAIN / D, 1);
  torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
    const Buffers buffers(BUFFERS, D);
    for (int64_t n = begin; n < end; ++n) {
      if (!unit) {
        std::memcpy(row_at(y, n, bytes), row_at(table, indices[n], bytes), bytes);
        continue;
      }
      const float* w = tables.load(indices[n], buffers[Y]);
      float* y_row = ys.place(n, buffers[Y]);

      scale(w, 1.0f / std::max(std::sqrt(dot(w, w, D)), EPS), D, y_row);

      ys.store(n, y_row);
    }
  });
}

void table_rows_bwd(const Tensor& dy, const std::optional<Tensor>& table, const Tensor& rows,
                    const Tensor& tokens, const Tensor& dtable) {
  const int64_t N = dy.size(0), D = dy.size(1);
  const Rows dys(dy, D), tables(table, D), dtables(dtable, D);
  const int64_t *row_of = integers(rows), *token_of = integers(tokens);

  // of memory that is new, torch's own zeros take the least time
  Tensor zeroed = dtable;
  torch::stable::zero_(zeroed);

  enum { W, DY, SUM, BUFFERS = SUM + TaskSums<1>::BUFFERS };
  const int64_t grain = std::max<int64_t>(GRAIN / D, 1);
  torch::stable::parallel_for(0, dtable.size(0), grain, [&](int64_t begin, int64_t end) {
    const Buffers buffers(BUFFERS, D);
    int64_t at = std::lower_bound(row_of, row_of + N, begin) - row_of;
    while (at < N && row_of[at] < end) {
      const int64_t row = row_of[at];
      TaskSums<1> sum(buffers, SUM, D);
      for (; at < N && row_of[at] == row; ++at) {
        add_row(dys.load(token_of[at], buffers[DY]), D, sum[0]);
        sum.count_row();
      }
      float* total = sum.finish()[0];
      if (tables) unit_backward(tables.load(row, buffers[W]), D, total);
      dtables.write(row, total);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("table_rows_fwd", TORCH_BOX(&table_rows_fwd));
  m.impl("table_rows_bwd", TORCH_BOX(&table_rows_bwd));
}

}  // namespace dbkernels
