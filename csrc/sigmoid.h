// sigmoid(x) = 1 / (1 + exp(-x)), without a branch, so that compilers vectorise its loops.
//
// exp(x) = 2**n * exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, by the polynomial of Cephes expf
// (Moshier 1992): within 2 units of the last place. NaN stays NaN.
#pragma once

#include <limits>

#include "element.h"

namespace dbkernels {

inline float exponential(float x) {
  // adding it rounds to a whole number, which is then in the lowest bits
  constexpr float WHOLE = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + WHOLE;
  const float n = shifted - WHOLE;
  // ln 2 in two parts: n times the first is exact
  float r = x - n * 0.693359375f;
  r += n * 2.12194440e-4f;

  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = float_of((bits_of(shifted) + 127u) << 23);
  const float result = (p * r * r + r + 1.0f) * power;

  // beyond these n is no exponent of a normal number
  const float above = x > 88.3f ? std::numeric_limits<float>::infinity() : result;
  return x < -87.3f ? 0.0f : above;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace dbkernels
