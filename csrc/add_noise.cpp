// add_noise, CPU: one tile of one sample at a time, of which the noise lies in the cache.
// The maths is in score.h and in dbkernels/ops/add_noise.py.
//
// All tensors are contiguous: z0 (B, ...), p, q (B, elements / run), z (B, ...), which is written.
#include "noise.h"
#include "ops.h"
#include "score.h"

namespace dbkernels {
namespace {

template <typename Z0, typename Z>
void add_noise_run(const Z0* __restrict__ z0, const float* __restrict__ noise, int64_t count,
                   float p, float q, Z* __restrict__ z) {
  for (int64_t i = 0; i < count; ++i) from_float(noised(to_float(z0[i]), noise[i], p, q), z[i]);
}

}  // namespace

void add_noise_cpu(const Tensor& z0, const Tensor& p, const Tensor& q, const Tensor& z,
                   int64_t seed, const Tensor& step, int64_t sample) {
  const int64_t B = z0.size(0), elements = z0.numel() / B;
  const Draw draw = draw_of(seed, step, sample, NOISE);
  const Runs runs = runs_of(p, B, elements);
  const auto* of_z0 = static_cast<const float*>(p.data_ptr());
  const auto* of_noise = static_cast<const float*>(q.data_ptr());
  with_pointer(z0, [&](const auto* from) {
    with_pointer(z, [&](auto* to) {
      for_each_tile(B, elements, [&](const NoiseTile& tile) {
        alignas(64) float noise[TILE];
        normal_tile(draw, tile, noise);
        const int64_t at = tile.b * elements + tile.start;
        for_each_run(tile, runs, [&](int64_t begin, int64_t end, int64_t entry) {
          add_noise_run(from + at + begin, noise + begin, end - begin, of_z0[entry],
                        of_noise[entry], to + at + begin);
        });
      });
    });
  });
}

}  // namespace dbkernels
