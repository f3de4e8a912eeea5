// add_noise, CPU: one tile of one sample at a time, of which the noise lies in the cache.
// The maths is in score.h and in dbkernels/ops/add_noise.py.
//
// All tensors are contiguous: z0 (B, ...), sigma (B,), z (B, ...), which is written.
#include "noise.h"
#include "ops.h"
#include "score.h"

namespace dbkernels {
namespace {

template <typename Z0, typename Z>
void add_noise_tile(const Z0* __restrict__ z0, const float* __restrict__ noise, int64_t count,
                    float sigma, float scale, Z* __restrict__ z) {
  for (int64_t i = 0; i < count; ++i) {
    from_float(noised(to_float(z0[i]), sigma, noise[i]) * scale, z[i]);
  }
}

}  // namespace

void add_noise_cpu(const Tensor& z0, const Tensor& sigma, const Tensor& z, int64_t seed,
                   const Tensor& step, int64_t sample, bool scaled, double sigma_data) {
  const int64_t B = sigma.numel(), elements = z0.numel() / B;
  const Draw draw = draw_of(seed, step, sample, NOISE);
  const auto* levels = static_cast<const float*>(sigma.data_ptr());
  with_pointer(z0, [&](const auto* from) {
    with_pointer(z, [&](auto* to) {
      for_each_tile(B, elements, [&](const NoiseTile& tile) {
        alignas(64) float noise[TILE];
        normal_tile(draw, tile, noise);
        const float level = levels[tile.b];
        const float scale = scaled ? c_in(level, static_cast<float>(sigma_data)) : 1.0f;
        const int64_t at = tile.b * elements + tile.start;
        add_noise_tile(from + at, noise, tile.count, level, scale, to + at);
      });
    });
  });
}

}  // namespace dbkernels
