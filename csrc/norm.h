// The norm of one row, its modulation and their gradients; the maths: dbkernels/ops/adaln_norm.py.
//
//     y = weight * x_hat + shift,    x_hat = (x - mean) * rstd,    weight = 1 + scale
//
// Elements are read before they are written, so y may lie on dy and x_hat on x.
#pragma once

#include <cstdint>

namespace dbkernels {

struct Stats {
  float mean, rstd;
};

Stats statistics(const float* x, int64_t D, float eps, bool centred);

void weight_of(const float* scale, int64_t D, float* weight);

void modulate(
    const float* x, Stats stats, const float* weight, const float* shift, int64_t D, float* y);

// means over a row that its gradient needs, with g = weight * dy
struct Means {
  float g, gx;
};

// also x_hat, and its share of dscale and dshift
Means backward_means(const float* dy, const float* x, Stats stats, const float* weight, int64_t D,
                     bool centred, float* x_hat, float* dscale, float* dshift);

// dx, plus dres where there is one
void backward_row(const float* dy, const float* dres, const float* x_hat, float rstd, Means means,
                  const float* weight, int64_t D, float* dx);

// y from x_hat
void modulate_again(
    const float* x_hat, const float* weight, const float* shift, int64_t D, float* y);

}  // namespace dbkernels
