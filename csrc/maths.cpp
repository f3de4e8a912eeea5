// The arithmetic of one element on Python's numbers, for tests.
#include <pybind11/pybind11.h>

#include <tuple>

#include "element.h"
#include "philox.h"
#include "score.h"

using namespace dbkernels;

namespace {

template <typename T>
float from_bits(uint16_t bits) {
  return to_float(T{bits});
}

template <typename T>
uint16_t to_bits(float x) {
  T y;
  from_float(x, y);
  return y.bits;
}

auto draw_words(int64_t seed, int64_t step, int64_t sample, int stream) {
  const Draw draw(seed, step, sample, stream);
  return std::tuple(draw.sample, draw.step_low, draw.step_high, draw.key_low, draw.key_high);
}

auto words(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  const Words x = philox(c0, c1, c2, c3, k0, k1);
  return std::tuple(x.x0, x.x1, x.x2, x.x3);
}

auto cos_and_sin(float a) {
  float cos_a, sin_a;
  cos_sin(a, cos_a, sin_a);
  return std::tuple(cos_a, sin_a);
}

auto normals(uint32_t x0, uint32_t x1) {
  float n0, n1;
  pair_of_normals(x0, x1, n0, n1);
  return std::tuple(n0, n1);
}

}  // namespace

PYBIND11_MODULE(_maths, m) {
  m.def("from_bfloat16", &from_bits<BFloat16>);
  m.def("from_float16", &from_bits<Float16>);
  m.def("to_bfloat16", &to_bits<BFloat16>);
  m.def("to_float16", &to_bits<Float16>);
  m.def("draw_words", &draw_words);
  m.def("philox", &words);
  m.def("logarithm", &logarithm);
  m.def("cos_sin", &cos_and_sin);
  m.def("pair_of_normals", &normals);
  m.def("uniform", &uniform);
  m.def("noised", &noised);
  m.def("score_error", &score_error);
  m.def("sample_loss", &sample_loss);
}
