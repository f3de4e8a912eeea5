// The norm of one row, its modulation, and their gradients; see norm.h.
#include "norm.h"

#include <cmath>
#include <limits>

#include "wide.h"

namespace dbkernels {
namespace {

// f(i) added up over a row, by halves, so that an addition seldom waits for the one before it
template <typename F>
inline float sum_of(int64_t D, const F& f) {
  const int64_t half = D / 2;
  float first = 0.0f, second = 0.0f;
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < half; ++i) {
    first += f(i);
    second += f(half + i);
  }
  return D % 2 ? first + second + f(D - 1) : first + second;
}

}  // namespace

DBK_WIDE Stats statistics(const float* x, int64_t D, float eps, bool centred) {
  float mean = 0.0f;
  if (centred) {
    mean = sum_of(D, [=](int64_t i) { return x[i]; }) / D;
    // what rounding left out of a mean far from 0
    mean += sum_of(D, [=](int64_t i) { return x[i] - mean; }) / D;
  }
  const float squares = sum_of(D, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  // a variance that overflows would have a rstd of 0, and every row like it a norm of 0
  const float rstd = std::isinf(squares) ? std::numeric_limits<float>::quiet_NaN()
                                         : 1.0f / std::sqrt(squares / D + eps);
  return {mean, rstd};
}

DBK_WIDE void weight_of(const float* scale, int64_t D, float* weight) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) weight[i] = 1.0f + scale[i];
}

DBK_WIDE void modulate(
    const float* x, Stats stats, const float* weight, const float* shift, int64_t D, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) {
    const float x_hat = (x[i] - stats.mean) * stats.rstd;
    y[i] = weight[i] * x_hat + shift[i];
  }
}

DBK_WIDE Means backward_means(const float* dy, const float* x, Stats stats, const float* weight,
                              int64_t D, bool centred, float* x_hat, float* dscale,
                              float* dshift) {
  float g_sum = 0.0f, gx_sum = 0.0f;
#pragma omp simd reduction(+ : g_sum, gx_sum)
  for (int64_t i = 0; i < D; ++i) {
    const float hat = (x[i] - stats.mean) * stats.rstd;
    const float g = weight[i] * dy[i];
    g_sum += g;
    gx_sum += g * hat;
    dscale[i] += dy[i] * hat;
    dshift[i] += dy[i];
    x_hat[i] = hat;
  }
  return {centred ? g_sum / D : 0.0f, gx_sum / D};
}

DBK_WIDE void backward_row(const float* dy, const float* dres, const float* x_hat, float rstd,
                           Means means, const float* weight, int64_t D, float* dx) {
  if (dres == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) {
      dx[i] = rstd * (weight[i] * dy[i] - means.g - x_hat[i] * means.gx);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) {
      dx[i] = rstd * (weight[i] * dy[i] - means.g - x_hat[i] * means.gx) + dres[i];
    }
  }
}

DBK_WIDE void modulate_again(
    const float* x_hat, const float* weight, const float* shift, int64_t D, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) y[i] = weight[i] * x_hat[i] + shift[i];
}

}  // namespace dbkernels
