// The noise of a draw over the samples of a tensor, CUDA: who owns what, and how it is read.
//
// A thread owns VECTOR elements of one sample, so two whole counters, and reads and writes them 16
// bytes at a time where every sample begins at a multiple of 16 bytes. A block owns a tile of
// VECTOR * blockDim.x elements, and where there are more samples than blocks may lie above each
// other, the same tile of several samples.
#pragma once

#include <cstdint>
#include <initializer_list>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "ops.h"
#include "philox.h"

// torch built for a CPU has no such function, and loads this library too
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace dbkernels {

constexpr int VECTOR = 8;
constexpr int THREADS = 128;  // of a block, at most
constexpr int WARP = 32;
constexpr int64_t MAX_GRID_Y = 65535;  // a limit of CUDA; samples beyond it take turns

// The stream that the tensor's device works on, for launches that follow.
inline cudaStream_t stream_of(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  // the runtime linked into this library is told, whichever one torch speaks to
  STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "cannot use CUDA device ", device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, " was not launched: ", cudaGetErrorString(error));
}

// A draw as a kernel is given it: the step is read when the kernel runs, so that a graph draws anew
// at each replay.
struct DrawArguments {
  int64_t seed;
  const int64_t* step;
  int64_t sample;

  DrawArguments(int64_t seed, const Tensor& step, int64_t sample)
      : seed(seed), step(static_cast<const int64_t*>(step.data_ptr())), sample(sample) {}

  // for each sample again, because words that are kept from one to the next take registers
  __device__ __forceinline__ Draw read(int stream) const {
    return Draw(seed, __ldg(step), sample, stream);
  }
};

struct NoiseGrid {
  dim3 blocks, threads;
};

inline NoiseGrid noise_grid(int64_t B, int64_t elements) {
  const int64_t vectors = (elements + VECTOR - 1) / VECTOR;
  const int64_t threads = vectors < THREADS ? (vectors + WARP - 1) / WARP * WARP : THREADS;
  const auto tiles = static_cast<unsigned>((vectors + threads - 1) / threads);
  return {dim3(tiles, static_cast<unsigned>(B < MAX_GRID_Y ? B : MAX_GRID_Y)),
          dim3(static_cast<unsigned>(threads))};
}

// whether each vector of each sample may be read at once; a null pointer is not read
inline bool vectors_are_aligned(int64_t elements, std::initializer_list<const void*> pointers) {
  bool aligned = elements % VECTOR == 0;
  for (const void* pointer : pointers) aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return aligned;
}

// the first element of this thread in its sample
__device__ __forceinline__ int64_t first_element() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
}

// f(i, entry) for each element of a vector, in order; those past the end of the sample have its last.
template <typename F>
__device__ __forceinline__ void for_each_entry(const Runs& runs, int64_t b, int64_t start,
                                               int64_t left, const F& f) {
  if (runs.row == 1) {  // what is read of it is read once
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) f(i, b);
    return;
  }
  // one division, because that of 64 bits is many instructions
  const int64_t before = start / runs.run;
  int64_t entry = b * runs.row + before, to_next = (before + 1) * runs.run - start;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    f(i, entry);
    if (--to_next > 0 || i + 1 >= left) continue;
    ++entry;
    to_next = runs.run;
  }
}

template <typename T>
constexpr int LOADS = VECTOR * sizeof(T) / sizeof(uint4);

// left: elements from x to the end of the sample; those past it are 0
template <typename T>
__device__ __forceinline__ void load_vector(const T* x, int64_t left, bool aligned,
                                            float (&y)[VECTOR]) {
  if (aligned) {
    uint4 words[LOADS<T>];
    T elements[VECTOR];
#pragma unroll
    for (int i = 0; i < LOADS<T>; ++i) words[i] = reinterpret_cast<const uint4*>(x)[i];
    memcpy(elements, words, sizeof words);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) y[i] = to_float(elements[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) y[i] = i < left ? to_float(x[i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store_vector(const float (&x)[VECTOR], int64_t left, bool aligned,
                                             T* y) {
  T elements[VECTOR];
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) from_float(x[i], elements[i]);
  if (aligned) {
    uint4 words[LOADS<T>];
    memcpy(words, elements, sizeof words);
#pragma unroll
    for (int i = 0; i < LOADS<T>; ++i) reinterpret_cast<uint4*>(y)[i] = words[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    if (i < left) y[i] = elements[i];
  }
}

// Normals of row b from element `start`, a multiple of VECTOR.
__device__ __forceinline__ void normal_vector(const Draw& draw, int64_t b, int64_t start,
                                              float (&y)[VECTOR]) {
#pragma unroll
  for (int i = 0; i < VECTOR; i += NORMALS) {
    const Words words = words_of(draw, b, static_cast<uint32_t>((start + i) / NORMALS));
    pair_of_normals(words.x0, words.x1, y[i], y[i + 1]);
    pair_of_normals(words.x2, words.x3, y[i + 2], y[i + 3]);
  }
}

}  // namespace dbkernels
