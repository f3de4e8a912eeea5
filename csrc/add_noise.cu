// add_noise, CUDA: one read, one write, and the noise between them in registers.
// The maths is in score.h and in dbkernels/ops/add_noise.py; noise.cuh says which thread owns what.
//
// All tensors are contiguous: z0 (B, ...), sigma (B,), z (B, ...), which is written.
#include "noise.cuh"
#include "score.h"

namespace dbkernels {
namespace {

template <typename Z0, typename Z>
__global__ void __launch_bounds__(THREADS) add_noise_kernel(
    const Z0* __restrict__ z0, const float* __restrict__ sigma,  // (B, elements), (B,)
    Z* __restrict__ z,                                           // (B, elements)
    DrawArguments given, int64_t B, int64_t elements, float sigma_data, bool scaled, bool aligned) {
  const int64_t start = first_element(), left = elements - start;
  if (left <= 0) return;
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    const int64_t at = b * elements + start;
    float x[VECTOR], noise[VECTOR];
    const Draw draw = given.read(NOISE);
    load_vector(z0 + at, left, aligned, x);
    const float level = level_or_nan(sigma[b]);
    const float scale = scaled ? c_in(level, sigma_data) : 1.0f;

    normal_vector(draw, b, start, noise);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[i] = noised(x[i], level, noise[i]) * scale;

    store_vector(x, left, aligned, z + at);
  }
}

}  // namespace

void add_noise_cuda(const Tensor& z0, const Tensor& sigma, const Tensor& z, int64_t seed,
                    const Tensor& step, int64_t sample, bool scaled, double sigma_data) {
  const int64_t B = sigma.numel(), elements = z0.numel() / B;
  const DrawArguments draw(seed, step, sample);
  const NoiseGrid grid = noise_grid(B, elements);
  const bool aligned = vectors_are_aligned(elements, {z0.data_ptr(), z.data_ptr()});
  const auto* levels = static_cast<const float*>(sigma.data_ptr());
  const cudaStream_t stream = stream_of(z0);
  with_pointer(z0, [&](const auto* from) {
    with_pointer(z, [&](auto* to) {
      add_noise_kernel<<<grid.blocks, grid.threads, 0, stream>>>(
          from, levels, to, draw, B, elements, static_cast<float>(sigma_data), scaled, aligned);
    });
  });
  check_launch("add_noise");
}

}  // namespace dbkernels
