// Loads and stores of float32, bfloat16 and float16 as float32; one rounding, to nearest even.
//
// On the CPU the conversions are integer arithmetic without branches, which compilers vectorise on
// any machine. They do not depend on whether denormals are flushed, but for a float32 that is one.
// NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "host_device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dbkernels {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

DBK_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

DBK_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

DBK_HD float to_float(float x) { return x; }

DBK_HD float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

DBK_HD float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t shifted = (x.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t biased = shifted + (112u << 23);
  // a denormal gains its implicit bit by one exponent more, less the value of that bit
  const uint32_t small = bits_of(float_of(biased + (1u << 23)) - float_of(113u << 23));
  const uint32_t large = exponent == 0x0f800000u ? biased + (112u << 23) : biased;
  return float_of(sign | (exponent == 0 ? small : large));
#endif
}

DBK_HD void from_float(float x, float& y) { y = x; }

DBK_HD void from_float(float x, BFloat16& y) {
#ifdef __CUDA_ARCH__
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40u;
  y.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
#endif
}

DBK_HD void from_float(float x, Float16& y) {
#ifdef __CUDA_ARCH__
  y.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t sign = bits_of(x) & 0x80000000u;
  const uint32_t bits = bits_of(x) ^ sign;
  // adding one half leaves the bits of a denormal, rounded, in the last places
  const uint32_t small = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
  const uint32_t large = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = bits < 113u << 23 ? small : normal;
  y.bits = static_cast<uint16_t>(sign >> 16 | (bits >= 143u << 23 ? large : finite));
#endif
}

// count elements as float32
template <typename T>
inline void load(const T* __restrict__ x, int64_t count, float* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) y[i] = to_float(x[i]);
}

template <typename T>
inline void store(const float* __restrict__ x, int64_t count, T* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) from_float(x[i], y[i]);
}

// f(T{}) for the element type of a dtype
template <typename F>
inline void with_element(torch::headeronly::ScalarType dtype, const F& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Float16{});
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

}  // namespace dbkernels
