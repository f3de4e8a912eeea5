// Philox 4x32-10 and the normals of its words, host and device; the counter, the key, the rounds,
// the normals and their sources are in dbkernels/ops/philox.py.
//
//     u = x0 / 2**32 + 2**-33,    r = sqrt(-2 ln u),    a = 2 pi x1 / 2**32
//     n0 = r cos a,               n1 = r sin a
//
// Every sum of a product is one fmaf, so that no compiler chooses whether to round the product:
// a number has the same bits in a vector, in its scalar remainder and on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"

namespace dbkernels {

constexpr int ROUNDS = 10;
constexpr uint32_t MULTIPLIER_0 = 0xD2511F53u, MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t INCREMENT_0 = 0x9E3779B9u, INCREMENT_1 = 0xBB67AE85u;
constexpr int NORMALS = 4;  // of one counter
constexpr int NOISE = 0, LEVEL = 1;  // streams

struct Words {
  uint32_t x0, x1, x2, x3;
};

// What all counters of a draw share. The sample is that of row 0.
struct Draw {
  uint32_t sample, step_low, step_high, key_low, key_high;

  DBK_HD Draw(int64_t seed, int64_t step, int64_t sample, int stream)
      : sample(static_cast<uint32_t>(sample)),
        step_low(static_cast<uint32_t>(step)),
        step_high(static_cast<uint32_t>(step >> 32) << 8 | static_cast<uint32_t>(stream)),
        key_low(static_cast<uint32_t>(seed)),
        key_high(static_cast<uint32_t>(seed >> 32)) {}
};

DBK_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < ROUNDS; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * MULTIPLIER_0;
    const uint64_t p1 = static_cast<uint64_t>(c2) * MULTIPLIER_1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += INCREMENT_0;
    k1 += INCREMENT_1;
  }
  return {c0, c1, c2, c3};
}

// The words of four elements of row b, or of one token.
DBK_HD Words words_of(const Draw& draw, int64_t b, uint32_t group) {
  return philox(group, draw.sample + static_cast<uint32_t>(b), draw.step_low, draw.step_high,
                draw.key_low, draw.key_high);
}

// Of a positive normal number. Moshier, Cephes, logf.c.
DBK_HD float logarithm(float u) {
  // u = 2**e * m with m in [sqrt(1/2), sqrt(2)), so that a u just below 1 loses no digit to e
  const int32_t e = static_cast<int32_t>(bits_of(u) - 0x3f3504f3u) >> 23;
  const float x = float_of(bits_of(u) - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  const float k = static_cast<float>(e), x2 = x * x;
  float y = 7.0376836292e-2f;
  y = fmaf(y, x, -1.1514610310e-1f);
  y = fmaf(y, x, 1.1676998740e-1f);
  y = fmaf(y, x, -1.2420140846e-1f);
  y = fmaf(y, x, 1.4249322787e-1f);
  y = fmaf(y, x, -1.6668057665e-1f);
  y = fmaf(y, x, 2.0000714765e-1f);
  y = fmaf(y, x, -2.4999993993e-1f);
  y = fmaf(y, x, 3.3333331174e-1f);
  // ln 2 in two parts, of which the first times k is exact
  y = fmaf(y * x, x2, k * -2.12194440e-4f);
  y = fmaf(-0.5f, x2, y);
  return fmaf(k, 0.693359375f, x + y);
}

// Of an angle in [0, 2 pi]. Moshier, Cephes, sinf.c.
DBK_HD void cos_sin(float a, float& cos_a, float& sin_a) {
  const int32_t quarter = static_cast<int32_t>(fmaf(a, 0.63661977236758134f, 0.5f));
  const float k = static_cast<float>(quarter);
  // pi / 2 in three parts, of which small multiples of the first two are exact
  float y = fmaf(k, -1.5703125f, a);
  y = fmaf(k, -4.837512969970703e-4f, y);
  y = fmaf(k, -7.549789954891882e-8f, y);
  const float y2 = y * y;
  float sin_y = fmaf(-1.9515295891e-4f, y2, 8.3321608736e-3f);
  sin_y = fmaf(sin_y, y2, -1.6666654611e-1f);
  sin_y = fmaf(sin_y * y2, y, y);
  float cos_y = fmaf(2.443315711809948e-5f, y2, -1.388731625493765e-3f);
  cos_y = fmaf(cos_y, y2, 4.166664568298827e-2f);
  cos_y = fmaf(cos_y, y2, -0.5f);
  cos_y = fmaf(cos_y, y2, 1.0f);
  const bool odd = quarter & 1;
  const uint32_t q = static_cast<uint32_t>(quarter);
  // bit 1 of the quarter is the sign of the sine, and of the next quarter that of the cosine
  cos_a = float_of(bits_of(odd ? sin_y : cos_y) ^ (((q + 1) & 2u) << 30));
  sin_a = float_of(bits_of(odd ? cos_y : sin_y) ^ ((q & 2u) << 30));
}

DBK_HD void pair_of_normals(uint32_t x0, uint32_t x1, float& n0, float& n1) {
  const float u = fmaf(static_cast<float>(x0), 0x1p-32f, 0x1p-33f);
  const float r = sqrtf(-2.0f * logarithm(u));
  // 2 pi / 2**32 radians to one unit of a word
  cos_sin(static_cast<float>(x1) * 1.4629180792671596e-9f, n0, n1);
  n0 *= r;
  n1 *= r;
}

// 53 bits of two words, in (0, 1].
DBK_HD double uniform(uint32_t x0, uint32_t x1) {
  const int64_t bits = static_cast<int64_t>(x0 >> 5) << 26 | x1 >> 6;
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

}  // namespace dbkernels
