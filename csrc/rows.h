// Rows of D elements as float32, and how the rows of (B, T, D) are shared out.
//
// Work is cut by size alone, so any number of threads gives the same bits. A row that is float32 is
// worked on where it lies; any other is converted in a buffer that stays in the cache.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace dbkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t TASKS = 64;       // about, where rows are many: enough for a server's cores
constexpr int64_t TASK_ROWS = 8;    // at least, where a sample has as many
constexpr int64_t GRAIN = 1 << 15;  // elements that are worth waking a thread for

// count elements of a dtype as float32
void load_row(const void* x, ScalarType dtype, int64_t count, float* y);
void store_row(const float* x, ScalarType dtype, int64_t count, void* y);

// total += x
void add_row(const float* x, int64_t count, float* total);

// Rows of a tensor, `stride` elements apart; false where there is no tensor.
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t D, int64_t stride)
      : data_(static_cast<char*>(tensor.data_ptr())), dtype_(tensor.scalar_type()), D_(D) {
    bytes_ = stride * (dtype_ == ScalarType::Float ? sizeof(float) : sizeof(uint16_t));
  }
  Rows(const Tensor& tensor, int64_t D) : Rows(tensor, D, D) {}
  Rows(const std::optional<Tensor>& tensor, int64_t D) : D_(D) {
    if (tensor) *this = Rows(*tensor, D);
  }

  explicit operator bool() const { return data_ != nullptr; }

  // a row, in the buffer unless it is float32 already
  const float* load(int64_t row, float* buffer) const {
    if (dtype_ == ScalarType::Float) return reinterpret_cast<const float*>(at(row));
    load_row(at(row), dtype_, D_, buffer);
    return buffer;
  }

  // the only row, or the value where there is no tensor
  const float* load_or(float value, float* buffer) const {
    if (data_ != nullptr) return load(0, buffer);
    std::fill_n(buffer, D_, value);
    return buffer;
  }

  // a row in the place where it is computed
  float* load_in_place(int64_t row, float* buffer) const {
    load(row, buffer);
    return place(row, buffer);
  }

  // where to compute a row before it is stored
  float* place(int64_t row, float* buffer) const {
    const bool here = data_ != nullptr && dtype_ == ScalarType::Float;
    return here ? reinterpret_cast<float*>(at(row)) : buffer;
  }

  // a row that was computed in its place
  void store(int64_t row, const float* buffer) const {
    if (data_ != nullptr && dtype_ != ScalarType::Float) write(row, buffer);
  }

  void write(int64_t row, const float* values) const { store_row(values, dtype_, D_, at(row)); }

 private:
  char* at(int64_t row) const { return data_ + row * bytes_; }

  char* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t D_;
  int64_t bytes_ = 0;
};

inline Rows rows_of_modulation(const Tensor& tensor, int64_t D) {
  return Rows(tensor, D, tensor.stride(0));
}

// Rows of float32 of one thread, on cache lines of their own.
class Buffers {
 public:
  Buffers(int count, int64_t D)
      // a power of two apart, rows would be taken for each other by the processor
      : stride_((D + LINE - 1) / LINE * LINE + LINE), memory_(new float[count * stride_ + LINE]) {
    const auto start = reinterpret_cast<uintptr_t>(memory_.get());
    first_ = memory_.get() + (-start / sizeof(float)) % LINE;
  }

  float* operator[](int row) const { return first_ + row * stride_; }

 private:
  static constexpr int64_t LINE = 16;
  int64_t stride_;
  std::unique_ptr<float[]> memory_;
  float* first_;
};

// A task is some rows of one sample.
struct Task {
  int64_t index, sample, first, last;  // rows are numbered over all samples
};

class Cut {
 public:
  Cut(int64_t B, int64_t T) : B_(B), T_(T) {
    const int64_t wanted = (TASKS + B - 1) / B;
    rows_ = std::max((T + wanted - 1) / wanted, TASK_ROWS);
    splits_ = (T + rows_ - 1) / rows_;
  }

  int64_t samples() const { return B_; }
  int64_t splits() const { return splits_; }

  // f(task, buffers) for each
  template <typename F>
  void run(int64_t D, int buffers, const F& f) const {
    const int64_t grain = std::max<int64_t>(GRAIN / (std::min(rows_, T_) * D), 1);
    torch::stable::parallel_for(0, B_ * splits_, grain, [&](int64_t begin, int64_t end) {
      const Buffers rows(buffers, D);
      for (int64_t index = begin; index < end; ++index) f(task(index), rows);
    });
  }

 private:
  Task task(int64_t index) const {
    const int64_t sample = index / splits_, first = index % splits_ * rows_;
    return {index, sample, sample * T_ + first, sample * T_ + std::min(first + rows_, T_)};
  }

  int64_t B_, T_, rows_, splits_;
};

}  // namespace dbkernels
