// The numbers of a draw, CUDA: normals (B, elements) float32, and uniforms (B, T) float64.
#include "noise.cuh"

namespace dbkernels {
namespace {

__global__ void __launch_bounds__(THREADS) normal_kernel(
    float* __restrict__ y,  // (B, elements)
    DrawArguments given, int64_t B, int64_t elements, bool aligned) {
  const int64_t start = first_element(), left = elements - start;
  if (left <= 0) return;
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    float noise[VECTOR];
    normal_vector(given.read(NOISE), b, start, noise);
    store_vector(noise, left, aligned, y + b * elements + start);
  }
}

__global__ void __launch_bounds__(THREADS) uniform_kernel(
    double* __restrict__ y,  // (B, T)
    DrawArguments given, int64_t count, int64_t T) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= count) return;
  const Words words = words_of(given.read(LEVEL), i / T, static_cast<uint32_t>(i % T));
  y[i] = uniform(words.x0, words.x1);
}

}  // namespace

void philox_normal_cuda(const Tensor& normals, int64_t seed, const Tensor& step, int64_t sample) {
  const int64_t B = normals.size(0), elements = normals.size(1);
  const DrawArguments draw(seed, step, sample);
  const NoiseGrid grid = noise_grid(B, elements);
  auto* y = static_cast<float*>(normals.data_ptr());
  normal_kernel<<<grid.blocks, grid.threads, 0, stream_of(normals)>>>(
      y, draw, B, elements, vectors_are_aligned(elements, {y}));
  check_launch("philox_normal");
}

void philox_uniform_cuda(const Tensor& uniforms, int64_t seed, const Tensor& step, int64_t sample) {
  const int64_t count = uniforms.numel();
  const DrawArguments draw(seed, step, sample);
  const auto blocks = static_cast<unsigned>((count + THREADS - 1) / THREADS);
  auto* y = static_cast<double*>(uniforms.data_ptr());
  uniform_kernel<<<blocks, THREADS, 0, stream_of(uniforms)>>>(y, draw, count, uniforms.size(1));
  check_launch("philox_uniform");
}

}  // namespace dbkernels
