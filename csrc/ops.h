// The launchers of the noise side, and what they take: the arguments of the schemas in
// dbkernels/ops/{philox,add_noise,score_loss}.py, checked there, contiguous and not empty.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "element.h"

namespace dbkernels {

using torch::stable::Tensor;

// f(pointer) with the element type of a tensor
template <typename F>
inline void with_pointer(const Tensor& tensor, const F& f) {
  with_element(tensor.scalar_type(), [&](auto element) {
    f(static_cast<decltype(element)*>(tensor.data_ptr()));
  });
}

// of a tensor that may not be given
template <typename T>
inline T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// How a tensor says one thing of each run of elements of (B, elements): of a whole sample, of a
// token or of a single element.
struct Runs {
  int64_t run, row;  // elements of an entry, entries of a sample
};

inline Runs runs_of(const Tensor& entries, int64_t B, int64_t elements) {
  const int64_t row = entries.numel() / B;
  return {elements / row, row};
}

void philox_normal_cpu(const Tensor& normals, int64_t seed, const Tensor& step, int64_t sample);
void philox_normal_cuda(const Tensor& normals, int64_t seed, const Tensor& step, int64_t sample);

void philox_uniform_cpu(const Tensor& uniforms, int64_t seed, const Tensor& step, int64_t sample);
void philox_uniform_cuda(const Tensor& uniforms, int64_t seed, const Tensor& step, int64_t sample);

void add_noise_cpu(const Tensor& z0, const Tensor& p, const Tensor& q, const Tensor& z,
                   int64_t seed, const Tensor& step, int64_t sample);
void add_noise_cuda(const Tensor& z0, const Tensor& p, const Tensor& q, const Tensor& z,
                    int64_t seed, const Tensor& step, int64_t sample);

void score_loss_cpu(const Tensor& prediction, const Tensor& z0, const Tensor& alpha,
                    const Tensor& beta, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& dprediction,
                    const std::optional<Tensor>& dz0, const Tensor& losses, int64_t seed,
                    const Tensor& step, int64_t sample, double r);
void score_loss_cuda(const Tensor& prediction, const Tensor& z0, const Tensor& alpha,
                     const Tensor& beta, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& mask, const std::optional<Tensor>& dprediction,
                     const std::optional<Tensor>& dz0, const Tensor& losses, int64_t seed,
                     const Tensor& step, int64_t sample, double r);

}  // namespace dbkernels
