// score_loss, CPU: one tile of one sample at a time, of which noise and error lie in the cache.
// The maths is in score.h and in dbkernels/ops/score_loss.py.
//
// All tensors are contiguous: prediction, z0 (B, ...), alpha, beta, weight (B, elements / run),
// mask (B, elements / run of its own); written: dprediction, dz0 (B, ...), losses (B,). dprediction
// may be prediction itself, because a run has been read before it is written. Scratch: one float32
// to a tile, where a sample has more than one. Sums are added in an order that depends on the sizes
// alone.
#include "noise.h"
#include "ops.h"
#include "score.h"

namespace dbkernels {
namespace {

constexpr int64_t SUMS = 16;  // that are added at once: two vectors, one to wait for the other

// Which elements of a tile count; null where all do.
const uint8_t* counted_of(const uint8_t* mask, const Runs& runs, const NoiseTile& tile,
                          uint8_t* counted) {
  if (mask == nullptr) return nullptr;
  if (runs.run == 1) return mask + tile.b * runs.row + tile.start;
  for_each_run(tile, runs, [&](int64_t begin, int64_t end, int64_t entry) {
    std::fill(counted + begin, counted + end, mask[entry]);
  });
  return counted;
}

// e holds the noise, which becomes the error
template <typename F, typename Z0>
void error_of(float alpha, float beta, const F* __restrict__ prediction, const Z0* __restrict__ z0,
              const uint8_t* __restrict__ counted, int64_t count, float* __restrict__ e) {
  if (counted == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      e[i] = score_error(alpha, beta, to_float(prediction[i]), to_float(z0[i]), e[i], true);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool counts = counted[i] != 0;
    e[i] = score_error(alpha, beta, to_float(prediction[i]), to_float(z0[i]), e[i], counts);
  }
}

template <typename T>
void scaled(const float* __restrict__ e, int64_t count, float scale, T* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) from_float(e[i] * scale, y[i]);
}

float sum_of_squares(const float* e, int64_t count) {
  float sums[SUMS] = {};
  const int64_t whole = count / SUMS * SUMS;
  for (int64_t i = 0; i < whole; i += SUMS) {
    for (int64_t j = 0; j < SUMS; ++j) sums[j] = fmaf(e[i + j], e[i + j], sums[j]);
  }
  for (int64_t i = whole; i < count; ++i) sums[i - whole] = fmaf(e[i], e[i], sums[i - whole]);
  for (int64_t width = SUMS / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

// The arguments of the op and what follows from them, as a function of a tile.
template <typename F, typename Z0>
struct ScoreLoss {
  const F* prediction;
  const Z0* z0;
  const float *alpha, *beta, *weight;
  Runs runs;
  const uint8_t* mask;
  Runs mask_runs;
  F* dprediction;
  Z0* dz0;
  float* sums;  // of the weighted squares in each tile
  Draw draw;
  int64_t elements;
  float r2;  // 2 * r / elements

  void operator()(const NoiseTile& tile) const {
    alignas(64) float e[TILE];
    uint8_t in_tile[TILE];
    const uint8_t* counted = counted_of(mask, mask_runs, tile, in_tile);
    double sum = 0;
    normal_tile(draw, tile, e);
    for_each_run(tile, runs, [&](int64_t begin, int64_t end, int64_t entry) {
      const int64_t at = tile.b * elements + tile.start + begin, count = end - begin;
      const float a = alpha[entry], w = weight ? weight[entry] : 1.0f;
      float* error = e + begin;
      error_of(a, beta[entry], prediction + at, z0 + at, counted ? counted + begin : nullptr, count,
               error);
      if (dprediction) scaled(error, count, r2 * w, dprediction + at);
      if (dz0) scaled(error, count, -a * (r2 * w), dz0 + at);
      sum += static_cast<double>(w) * sum_of_squares(error, count);
    });
    sums[tile.index] = static_cast<float>(sum);
  }
};

// sums may be losses itself, where a sample is one tile
void add_tiles(const float* sums, int64_t B, int64_t elements, float* losses) {
  const int64_t tiles = tiles_of(elements);
  for (int64_t b = 0; b < B; ++b) {
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += sums[b * tiles + tile];
    losses[b] = sample_loss(sum, elements);
  }
}

}  // namespace

void score_loss_cpu(const Tensor& prediction, const Tensor& z0, const Tensor& alpha,
                    const Tensor& beta, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& dprediction,
                    const std::optional<Tensor>& dz0, const Tensor& losses, int64_t seed,
                    const Tensor& step, int64_t sample, double r) {
  const int64_t B = z0.size(0), elements = z0.numel() / B, tiles = tiles_of(elements);
  Tensor scratch = tiles > 1 ? torch::stable::new_empty(losses, {B * tiles}) : losses;
  auto* sums = static_cast<float*>(scratch.data_ptr());
  with_pointer(prediction, [&](auto* f) {
    with_pointer(z0, [&](auto* target) {
      using F = std::remove_pointer_t<decltype(f)>;
      using Z0 = std::remove_pointer_t<decltype(target)>;
      const ScoreLoss<F, Z0> score_tile{
          f, target,
          static_cast<const float*>(alpha.data_ptr()), static_cast<const float*>(beta.data_ptr()),
          pointer<const float>(weight), runs_of(alpha, B, elements),
          pointer<const uint8_t>(mask), runs_of(mask ? *mask : alpha, B, elements),
          pointer<F>(dprediction), pointer<Z0>(dz0), sums,
          draw_of(seed, step, sample, NOISE), elements, static_cast<float>(2 * r / elements)};
      for_each_tile(B, elements, score_tile);
    });
  });
  add_tiles(sums, B, elements, static_cast<float*>(losses.data_ptr()));
}

}  // namespace dbkernels
