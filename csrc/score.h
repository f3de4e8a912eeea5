// A noisy target, and the error of a network in its own target and its gradient, of one element;
// host and device. The coefficients are of a sample or of a token:
//
//     z = p * z0 + q * noise
//     e = F - (alpha * z0 + beta * noise)
//     loss[b] = sum weight * e**2 / elements,    dF = 2 * r * weight / elements * e
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace dbkernels {

DBK_HD float noised(float z0, float noise, float p, float q) { return fmaf(q, noise, p * z0); }

// 0 where the element does not count, whatever is there, NaN too
DBK_HD float score_error(float alpha, float beta, float prediction, float z0, float noise,
                         bool counted) {
  const float e = prediction - noised(z0, noise, alpha, beta);
  return counted ? e : 0.0f;
}

// of the weighted sum of the squares of a sample's errors
DBK_HD float sample_loss(double sum, int64_t elements) {
  return static_cast<float>(sum / static_cast<double>(elements));
}

}  // namespace dbkernels
