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

// Which elements of (B, elements) count, by entries of which each stands for a run of them.
struct Mask {
  const uint8_t* entries;  // null where all count
  int64_t run, row;        // elements of an entry, entries of a sample
};

inline Mask mask_of(const std::optional<Tensor>& mask, int64_t B, int64_t elements) {
  if (!mask) return {nullptr, 1, elements};
  const int64_t row = mask->numel() / B;
  return {pointer<const uint8_t>(mask), elements / row, row};
}

void philox_normal_cpu(const Tensor& normals, int64_t seed, const Tensor& step, int64_t sample);
void philox_normal_cuda(const Tensor& normals, int64_t seed, const Tensor& step, int64_t sample);

void philox_uniform_cpu(const Tensor& uniforms, int64_t seed, const Tensor& step, int64_t sample);
void philox_uniform_cuda(const Tensor& uniforms, int64_t seed, const Tensor& step, int64_t sample);

void add_noise_cpu(const Tensor& z0, const Tensor& sigma, const Tensor& z, int64_t seed,
                   const Tensor& step, int64_t sample, bool scaled, double sigma_data);
void add_noise_cuda(const Tensor& z0, const Tensor& sigma, const Tensor& z, int64_t seed,
                    const Tensor& step, int64_t sample, bool scaled, double sigma_data);

void score_loss_cpu(const Tensor& prediction, const Tensor& z0, const Tensor& sigma,
                    const std::optional<Tensor>& k, const std::optional<Tensor>& mask,
                    const std::optional<Tensor>& dprediction, const std::optional<Tensor>& dz0,
                    const Tensor& losses, int64_t seed, const Tensor& step, int64_t sample,
                    double sigma_data, double r);
void score_loss_cuda(const Tensor& prediction, const Tensor& z0, const Tensor& sigma,
                     const std::optional<Tensor>& k, const std::optional<Tensor>& mask,
                     const std::optional<Tensor>& dprediction, const std::optional<Tensor>& dz0,
                     const Tensor& losses, int64_t seed, const Tensor& step, int64_t sample,
                     double sigma_data, double r);

}  // namespace dbkernels
