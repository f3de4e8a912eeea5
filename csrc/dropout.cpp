// dropout, CPU; the maths is in dbkernels/ops/dropout.py.
//
// x and y are (B, ...), contiguous and of one dtype; y may be x: elements are read before they are
// written.
#include <torch/csrc/stable/library.h>

#include "noise.h"

namespace dbkernels {
namespace {

template <typename T>
void drop(const TileWords& words, int64_t count, uint64_t threshold, float scale, const T* x,
          T* y) {
  for (int64_t i = 0; i < count; ++i) {
    const bool kept = words[i % NORMALS][i / NORMALS] >= threshold;
    from_float(kept ? to_float(x[i]) * scale : 0.0f, y[i]);
  }
}

void dropout_fwd(const Tensor& x, const Tensor& y, int64_t seed, const Tensor& step,
                 int64_t sample, int64_t stream, int64_t threshold, double scale) {
  const int64_t B = x.size(0), elements = x.numel() / B;
  const Draw draw = draw_of(seed, step, sample, static_cast<int>(stream));
  with_pointer(x, [&](auto* from) {
    auto* to = static_cast<decltype(from)>(y.data_ptr());
    for_each_tile(B, elements, [&](const NoiseTile& tile) {
      alignas(64) TileWords words;
      word_tile(draw, tile, words);
      const int64_t at = tile.b * elements + tile.start;
      drop(words, tile.count, static_cast<uint64_t>(threshold), static_cast<float>(scale),
           from + at, to + at);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("dropout_fwd", TORCH_BOX(&dropout_fwd));
}

}  // namespace dbkernels
