// score_loss, CPU: one tile of one sample at a time, of which noise and error lie in the cache.
// The maths is in score.h and in dbkernels/ops/score_loss.py.
//
// All tensors are contiguous: prediction, z0 (B, ...), sigma, k (B,), mask (B, elements / run);
// written: dprediction, dz0 (B, ...), losses (B,). dprediction may be prediction itself, because a
// tile has been read before it is written. Scratch: one float32 to a tile, where a sample has more
// than one. Sums are added in an order that depends on the sizes alone.
#include "noise.h"
#include "ops.h"
#include "score.h"

namespace dbkernels {
namespace {

constexpr int64_t SUMS = 16;  // that are added at once: two vectors, one to wait for the other

// Which elements of a tile count; null where all do.
const uint8_t* counted_of(const Mask& mask, const NoiseTile& tile, uint8_t* counted) {
  if (mask.entries == nullptr) return nullptr;
  const uint8_t* entries = mask.entries + tile.b * mask.row;
  if (mask.run == 1) return entries + tile.start;
  for (int64_t i = 0; i < tile.count;) {
    const int64_t at = tile.start + i, end = std::min(i + mask.run - at % mask.run, tile.count);
    std::fill(counted + i, counted + end, entries[at / mask.run]);
    i = end;
  }
  return counted;
}

// e holds the noise, which becomes the error
template <typename F, typename Z0>
void error_tile(const ScoreRow& row, const F* __restrict__ prediction, const Z0* __restrict__ z0,
                const uint8_t* __restrict__ counted, int64_t count, float* __restrict__ e) {
  if (counted == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      e[i] = score_error(row, to_float(prediction[i]), to_float(z0[i]), e[i], true);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    e[i] = score_error(row, to_float(prediction[i]), to_float(z0[i]), e[i], counted[i] != 0);
  }
}

template <typename T>
void scale_tile(const float* __restrict__ e, int64_t count, float scale, T* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) from_float(e[i] * scale, y[i]);
}

// e is a whole tile; what lies past count is written over
float sum_of_squares(float* e, int64_t count) {
  float sums[SUMS] = {};
  const int64_t end = (count + SUMS - 1) / SUMS * SUMS;
  std::fill(e + count, e + end, 0.0f);
  for (int64_t i = 0; i < end; i += SUMS) {
    for (int64_t j = 0; j < SUMS; ++j) sums[j] = fmaf(e[i + j], e[i + j], sums[j]);
  }
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
  const float *sigma, *k;
  Mask mask;
  F* dprediction;
  Z0* dz0;
  float* sums;  // of the squares in each tile
  Draw draw;
  int64_t elements;
  float sigma_data, r2;

  void operator()(const NoiseTile& tile) const {
    alignas(64) float e[TILE];
    uint8_t counted[TILE];
    const int64_t at = tile.b * elements + tile.start;
    const ScoreRow row = score_row(sigma[tile.b], k ? k[tile.b] : 1.0f, sigma_data, r2);
    normal_tile(draw, tile, e);
    error_tile(row, prediction + at, z0 + at, counted_of(mask, tile, counted), tile.count, e);
    if (dprediction) scale_tile(e, tile.count, row.of_grad, dprediction + at);
    if (dz0) scale_tile(e, tile.count, -row.of_z0 * row.of_grad, dz0 + at);
    sums[tile.index] = sum_of_squares(e, tile.count);
  }
};

// sums may be losses itself, where a sample is one tile
void add_tiles(const float* sums, const float* k, int64_t B, int64_t elements, float* losses) {
  const int64_t tiles = tiles_of(elements);
  for (int64_t b = 0; b < B; ++b) {
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += sums[b * tiles + tile];
    losses[b] = sample_loss(sum, k ? k[b] : 1.0f, elements);
  }
}

}  // namespace

void score_loss_cpu(const Tensor& prediction, const Tensor& z0, const Tensor& sigma,
                    const std::optional<Tensor>& k, const std::optional<Tensor>& mask,
                    const std::optional<Tensor>& dprediction, const std::optional<Tensor>& dz0,
                    const Tensor& losses, int64_t seed, const Tensor& step, int64_t sample,
                    double sigma_data, double r) {
  const int64_t B = sigma.numel(), elements = z0.numel() / B, tiles = tiles_of(elements);
  const auto* levels = static_cast<const float*>(sigma.data_ptr());
  const auto* weights = pointer<const float>(k);
  Tensor scratch = tiles > 1 ? torch::stable::new_empty(losses, {B * tiles}) : losses;
  auto* sums = static_cast<float*>(scratch.data_ptr());
  with_pointer(prediction, [&](auto* f) {
    with_pointer(z0, [&](auto* target) {
      using F = std::remove_pointer_t<decltype(f)>;
      using Z0 = std::remove_pointer_t<decltype(target)>;
      const ScoreLoss<F, Z0> score_tile{
          f, target, levels, weights, mask_of(mask, B, elements),
          pointer<F>(dprediction), pointer<Z0>(dz0), sums,
          draw_of(seed, step, sample, NOISE), elements,
          static_cast<float>(sigma_data), static_cast<float>(2 * r / elements)};
      for_each_tile(B, elements, score_tile);
    });
  });
  add_tiles(sums, weights, B, elements, static_cast<float*>(losses.data_ptr()));
}

}  // namespace dbkernels
