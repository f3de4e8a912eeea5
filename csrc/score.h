// A noisy target, and the error of a preconditioned network and its gradient, of one element; host
// and device. With s = sqrt(sigma**2 + sigma_data**2):
//
//     z = z0 + sigma * noise,    c_in = 1 / s
//     e = F - (sigma / (sigma_data * s) * z0 - sigma_data / s * noise)
//     loss[b] = k[b] / elements * sum e**2,    dF = 2 * r * k[b] / elements * e
//
// dbkernels/ops/score_loss.py derives it.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace dbkernels {

// NaN where sigma is no level, which nobody looks at on a GPU.
DBK_HD float level_or_nan(float sigma) { return sigma > 0 && sigma < INFINITY ? sigma : NAN; }

DBK_HD float noised(float z0, float sigma, float noise) { return fmaf(sigma, noise, z0); }

DBK_HD float root_of_sum(float sigma, float sigma_data) {
  return sqrtf(fmaf(sigma, sigma, sigma_data * sigma_data));
}

DBK_HD float c_in(float sigma, float sigma_data) { return 1.0f / root_of_sum(sigma, sigma_data); }

// What all elements of a sample share.
struct ScoreRow {
  float of_z0, of_noise;  // in the target of F
  float of_grad;          // dF over e
};

// r2: 2 * r / elements
DBK_HD ScoreRow score_row(float sigma, float k, float sigma_data, float r2) {
  const float s = root_of_sum(sigma, sigma_data);
  return {sigma / (sigma_data * s), sigma_data / s, r2 * k};
}

// 0 where the element does not count, whatever is there, NaN too
DBK_HD float score_error(const ScoreRow& row, float prediction, float z0, float noise,
                         bool counted) {
  const float e = prediction - fmaf(row.of_z0, z0, -(row.of_noise * noise));
  return counted ? e : 0.0f;
}

// of the sum of the squares of a sample's errors
DBK_HD float sample_loss(double sum, float k, int64_t elements) {
  return static_cast<float>(sum * k / static_cast<double>(elements));
}

}  // namespace dbkernels
