// The noise of a draw over one tile of one sample, on the CPU.
//
// Words first and normals after, each in a loop that compilers vectorise; a tile of both stays in
// the first cache. Numbers do not depend on how a sample is cut into tiles, nor a tile on threads.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "ops.h"
#include "philox.h"

namespace dbkernels {

constexpr int64_t TILE = 1024;            // elements
constexpr int64_t GROUPS = 8;             // counters at a time
constexpr int64_t FILL = NORMALS * GROUPS;  // a tile is filled to a multiple of this
constexpr int64_t WORTH_A_THREAD = 1 << 14;  // elements

// step () int64
inline Draw draw_of(int64_t seed, const torch::stable::Tensor& step, int64_t sample, int stream) {
  return Draw(seed, *static_cast<const int64_t*>(step.data_ptr()), sample, stream);
}

inline int64_t tiles_of(int64_t elements) { return (elements + TILE - 1) / TILE; }

struct NoiseTile {
  int64_t index;  // of all tiles of all samples
  int64_t b, start, count;
};

// f(tile) for every tile of (B, elements), on the threads of torch
template <typename F>
inline void for_each_tile(int64_t B, int64_t elements, const F& f) {
  const int64_t tiles = tiles_of(elements);
  const int64_t grain = std::max<int64_t>(WORTH_A_THREAD / std::min(elements, TILE), 1);
  torch::stable::parallel_for(0, B * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t start = index % tiles * TILE;
      f(NoiseTile{index, index / tiles, start, std::min(TILE, elements - start)});
    }
  });
}

// f(begin, end, entry) for each run that a tile has a part of; begin and end count from its start
template <typename F>
inline void for_each_run(const NoiseTile& tile, const Runs& runs, const F& f) {
  for (int64_t begin = 0; begin < tile.count;) {
    const int64_t at = tile.start + begin, end = std::min(begin + runs.run - at % runs.run, tile.count);
    f(begin, end, tile.b * runs.row + at / runs.run);
    begin = end;
  }
}

// Four words, each in the low half of its lane; what is in the high half has no meaning.
using Lanes = uint64_t __attribute__((vector_size(32)));

inline Lanes product_of_low(Lanes a, Lanes b) {
#ifdef __AVX2__
  return reinterpret_cast<Lanes>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

struct LaneWords {
  Lanes x0, x1, x2, x3;
};

// `philox` of four groups. A product of words fills its lane and leaves both halves in place, where
// a vector of 32-bit words would be shuffled before and after each product.
inline LaneWords philox_lanes(const Draw& draw, uint32_t c1, Lanes c0) {
  LaneWords x = {c0, Lanes{} + c1, Lanes{} + draw.step_low, Lanes{} + draw.step_high};
  uint32_t k0 = draw.key_low, k1 = draw.key_high;
#pragma GCC unroll 10
  for (int round = 0; round < ROUNDS; ++round) {
    const Lanes p0 = product_of_low(x.x0, Lanes{} + MULTIPLIER_0);
    const Lanes p1 = product_of_low(x.x2, Lanes{} + MULTIPLIER_1);
    x = {(p1 >> 32) ^ x.x1 ^ k0, p1, (p0 >> 32) ^ x.x3 ^ k1, p0};
    k0 += INCREMENT_0;
    k1 += INCREMENT_1;
  }
  return x;
}

// Words of even groups and of the odd ones between them, in order.
inline void interleave(Lanes even, Lanes odd, uint32_t* words) {
  const Lanes both = (even & 0xffffffffu) | odd << 32;
  memcpy(words, &both, sizeof both);
}

inline void pairs_of_normals(const uint32_t* __restrict__ x0, const uint32_t* __restrict__ x1,
                             int64_t groups, float* __restrict__ n0, float* __restrict__ n1) {
  for (int64_t g = 0; g < groups; ++g) pair_of_normals(x0[g], x1[g], n0[g], n1[g]);
}

using TileWords = uint32_t[NORMALS][TILE / NORMALS];

// Words of a tile of row b; `start` is a multiple of 4. How many groups there are, a few too many.
inline int64_t word_tile(const Draw& draw, const NoiseTile& tile, TileWords& words) {
  const int64_t groups = (tile.count + FILL - 1) / FILL * GROUPS;
  const uint32_t c1 = draw.sample + static_cast<uint32_t>(tile.b);
  const Lanes c0 = Lanes{0, 2, 4, 6} + static_cast<uint64_t>(tile.start / NORMALS);
  for (int64_t g = 0; g < groups; g += GROUPS) {
    const LaneWords even = philox_lanes(draw, c1, c0 + static_cast<uint64_t>(g));
    const LaneWords odd = philox_lanes(draw, c1, c0 + static_cast<uint64_t>(g + 1));
    interleave(even.x0, odd.x0, words[0] + g);
    interleave(even.x1, odd.x1, words[1] + g);
    interleave(even.x2, odd.x2, words[2] + g);
    interleave(even.x3, odd.x3, words[3] + g);
  }
  return groups;
}

// Normals of a tile of row b, and y a whole tile.
inline void normal_tile(const Draw& draw, const NoiseTile& tile, float* __restrict__ y) {
  alignas(64) TileWords words;
  alignas(64) float normals[NORMALS][TILE / NORMALS];
  const int64_t groups = word_tile(draw, tile, words);
  pairs_of_normals(words[0], words[1], groups, normals[0], normals[1]);
  pairs_of_normals(words[2], words[3], groups, normals[2], normals[3]);
  for (int64_t g = 0; g < groups; ++g) {
    for (int n = 0; n < NORMALS; ++n) y[NORMALS * g + n] = normals[n][g];
  }
}

}  // namespace dbkernels
