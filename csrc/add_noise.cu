// add_noise, CUDA: one read, one write, and the noise between them in registers.
// The maths is in score.h and in dbkernels/ops/add_noise.py; noise.cuh says which thread owns what.
//
// All tensors are contiguous: z0 (B, ...), p, q (B, elements / run), z (B, ...), which is written.
#include "noise.cuh"
#include "score.h"

namespace dbkernels {
namespace {

template <typename Z0, typename Z>
__global__ void __launch_bounds__(THREADS) add_noise_kernel(
    const Z0* __restrict__ z0,                               // (B, elements)
    const float* __restrict__ p, const float* __restrict__ q,  // (B, elements / run) twice
    Z* __restrict__ z,                                       // (B, elements)
    DrawArguments given, int64_t B, int64_t elements, Runs runs, bool aligned) {
  const int64_t start = first_element(), left = elements - start;
  if (left <= 0) return;
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    const int64_t at = b * elements + start;
    float x[VECTOR], noise[VECTOR];
    const Draw draw = given.read(NOISE);
    load_vector(z0 + at, left, aligned, x);

    normal_vector(draw, b, start, noise);
    for_each_entry(runs, b, start, left, [&](int i, int64_t entry) {
      x[i] = noised(x[i], noise[i], p[entry], q[entry]);
    });

    store_vector(x, left, aligned, z + at);
  }
}

}  // namespace

void add_noise_cuda(const Tensor& z0, const Tensor& p, const Tensor& q, const Tensor& z,
                    int64_t seed, const Tensor& step, int64_t sample) {
  const int64_t B = z0.size(0), elements = z0.numel() / B;
  const DrawArguments draw(seed, step, sample);
  const NoiseGrid grid = noise_grid(B, elements);
  const bool aligned = vectors_are_aligned(elements, {z0.data_ptr(), z.data_ptr()});
  const auto* of_z0 = static_cast<const float*>(p.data_ptr());
  const auto* of_noise = static_cast<const float*>(q.data_ptr());
  const cudaStream_t stream = stream_of(z0);
  with_pointer(z0, [&](const auto* from) {
    with_pointer(z, [&](auto* to) {
      add_noise_kernel<<<grid.blocks, grid.threads, 0, stream>>>(
          from, of_z0, of_noise, to, draw, B, elements, runs_of(p, B, elements), aligned);
    });
  });
  check_launch("add_noise");
}

}  // namespace dbkernels
