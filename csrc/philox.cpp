// The numbers of a draw, CPU: normals (B, elements) float32, and uniforms (B, T) float64.
#include "noise.h"
#include "ops.h"

namespace dbkernels {

void philox_normal_cpu(const Tensor& normals, int64_t seed, const Tensor& step, int64_t sample) {
  const int64_t B = normals.size(0), elements = normals.size(1);
  const Draw draw = draw_of(seed, step, sample, NOISE);
  auto* y = static_cast<float*>(normals.data_ptr());
  for_each_tile(B, elements, [&](const NoiseTile& tile) {
    alignas(64) float noise[TILE];
    normal_tile(draw, tile, noise);
    std::copy_n(noise, tile.count, y + tile.b * elements + tile.start);
  });
}

void philox_uniform_cpu(const Tensor& uniforms, int64_t seed, const Tensor& step, int64_t sample) {
  const int64_t T = uniforms.size(1);
  const Draw draw = draw_of(seed, step, sample, LEVEL);
  auto* y = static_cast<double*>(uniforms.data_ptr());
  const auto fill = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Words words = words_of(draw, i / T, static_cast<uint32_t>(i % T));
      y[i] = uniform(words.x0, words.x1);
    }
  };
  torch::stable::parallel_for(0, uniforms.numel(), WORTH_A_THREAD, fill);
}

}  // namespace dbkernels
