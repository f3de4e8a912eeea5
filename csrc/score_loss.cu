// score_loss, CUDA: one read of prediction and z0, one write of each gradient, and the error
// between them in registers. The maths is in score.h and in dbkernels/ops/score_loss.py; noise.cuh
// says which thread owns what.
//
// All tensors are contiguous: prediction, z0 (B, ...), alpha, beta, weight (B, elements / run),
// mask (B, elements / run of its own); written: dprediction, dz0 (B, ...), losses (B,). dprediction
// may be prediction itself, because a thread reads its elements before it writes them. Each block
// owns one weighted sum of squares to a sample: scratch of (B, tiles) float32, where there are
// several, which a second kernel adds in order. No atomics, so the same bits every run.
#include "noise.cuh"
#include "score.h"

#include <torch/csrc/stable/ops.h>

namespace dbkernels {
namespace {

// Which elements of a vector count; those past the end of the sample do not.
__device__ __forceinline__ void load_counted(const uint8_t* __restrict__ mask, const Runs& runs,
                                             int64_t b, int64_t start, int64_t left,
                                             bool (&counted)[VECTOR]) {
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) counted[i] = i < left;
  if (mask == nullptr) return;
  for_each_entry(runs, b, start, left, [&](int i, int64_t entry) {
    if (counted[i]) counted[i] = mask[entry] != 0;
  });
}

// The sum over the threads of a block, to all of them.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float of_warp[THREADS / WARP];
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_down_sync(~0u, x, lanes);
  __syncthreads();  // what the sample before left there has been read
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < blockDim.x / WARP; ++warp) sum += of_warp[warp];
  return sum;
}

template <typename F, typename Z0>
__global__ void __launch_bounds__(THREADS) score_loss_kernel(
    const F* prediction, const Z0* __restrict__ z0,                    // (B, elements) twice
    const float* __restrict__ alpha, const float* __restrict__ beta,   // (B, elements / run) twice
    const float* __restrict__ weight,                                  // the same, or null
    const uint8_t* __restrict__ mask,                                  // in its own runs, or null
    F* dprediction, Z0* __restrict__ dz0,                              // (B, elements) or null
    float* __restrict__ sums,                                          // (B, tiles)
    DrawArguments given, int64_t B, int64_t elements, Runs runs, Runs mask_runs, float r2,
    bool aligned) {
  const int64_t start = first_element(), left = elements - start;
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    float sum = 0;
    if (left > 0) {
      const int64_t at = b * elements + start;
      float e[VECTOR], target[VECTOR], noise[VECTOR];
      bool counted[VECTOR];
      const Draw draw = given.read(NOISE);
      load_vector(prediction + at, left, aligned, e);
      load_vector(z0 + at, left, aligned, target);
      load_counted(mask, mask_runs, b, start, left, counted);

      normal_vector(draw, b, start, noise);
      for_each_entry(runs, b, start, left, [&](int i, int64_t entry) {
        const float a = alpha[entry], w = weight == nullptr ? 1.0f : weight[entry];
        e[i] = score_error(a, beta[entry], e[i], target[i], noise[i], counted[i]);
        sum = fmaf(w * e[i], e[i], sum);
        e[i] *= r2 * w;
        target[i] = -a * e[i];
      });

      if (dprediction != nullptr) store_vector(e, left, aligned, dprediction + at);
      if (dz0 != nullptr) store_vector(target, left, aligned, dz0 + at);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[b * gridDim.x + blockIdx.x] = sum;
  }
}

// One warp to a sample. sums may be losses itself, where a sample is one tile.
__global__ void __launch_bounds__(THREADS) add_tiles_kernel(
    const float* sums,  // (B, tiles)
    float* losses,      // (B,)
    int64_t B, int64_t tiles, int64_t elements) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (THREADS / WARP);
  const int lane = threadIdx.x % WARP;
  int64_t b = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
  for (; b < B; b += warps) {
    double sum = 0;
    for (int64_t tile = lane; tile < tiles; tile += WARP) sum += sums[b * tiles + tile];
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
    if (lane == 0) losses[b] = sample_loss(sum, elements);
  }
}

void add_tiles(const float* sums, const Tensor& losses, int64_t tiles, int64_t elements,
               cudaStream_t stream) {
  const int64_t B = losses.numel(), blocks = (B + THREADS / WARP - 1) / (THREADS / WARP);
  const dim3 grid(static_cast<unsigned>(blocks < MAX_GRID_Y ? blocks : MAX_GRID_Y));
  auto* y = static_cast<float*>(losses.data_ptr());
  add_tiles_kernel<<<grid, THREADS, 0, stream>>>(sums, y, B, tiles, elements);
  check_launch("score_loss");
}

}  // namespace

void score_loss_cuda(const Tensor& prediction, const Tensor& z0, const Tensor& alpha,
                     const Tensor& beta, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& mask, const std::optional<Tensor>& dprediction,
                     const std::optional<Tensor>& dz0, const Tensor& losses, int64_t seed,
                     const Tensor& step, int64_t sample, double r) {
  const int64_t B = z0.size(0), elements = z0.numel() / B;
  const NoiseGrid grid = noise_grid(B, elements);
  const int64_t tiles = grid.blocks.x;
  const bool aligned =
      vectors_are_aligned(elements, {prediction.data_ptr(), z0.data_ptr(),
                                     pointer<void>(dprediction), pointer<void>(dz0)});
  Tensor scratch = tiles > 1 ? torch::stable::new_empty(losses, {B * tiles}) : losses;
  auto* sums = static_cast<float*>(scratch.data_ptr());
  const auto* of_z0 = static_cast<const float*>(alpha.data_ptr());
  const auto* of_noise = static_cast<const float*>(beta.data_ptr());
  const Runs runs = runs_of(alpha, B, elements);
  const cudaStream_t stream = stream_of(z0);
  with_pointer(prediction, [&](auto* f) {
    with_pointer(z0, [&](auto* target) {
      auto* df = pointer<std::remove_pointer_t<decltype(f)>>(dprediction);
      auto* dtarget = pointer<std::remove_pointer_t<decltype(target)>>(dz0);
      score_loss_kernel<<<grid.blocks, grid.threads, 0, stream>>>(
          f, target, of_z0, of_noise, pointer<const float>(weight), pointer<const uint8_t>(mask),
          df, dtarget, sums, DrawArguments(seed, step, sample), B, elements, runs,
          mask ? runs_of(*mask, B, elements) : runs, static_cast<float>(2 * r / elements),
          aligned);
    });
  });
  check_launch("score_loss");
  add_tiles(sums, losses, tiles, elements, stream);
}

}  // namespace dbkernels
