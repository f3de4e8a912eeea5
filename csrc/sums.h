// Sums over the tokens of a sample, in an order that depends on sizes alone.
//
// A task adds its rows in runs, so that the sum of many tokens keeps its last digits. Tasks that
// share a sample write partial sums, which are added in order: fewer than 2 TASKS rows of float32
// for each of N sums.
#pragma once

#include "rows.h"

namespace dbkernels {

constexpr int64_t RUN = 32;  // rows that are added one by one

// N sums of one task, in two buffers each.
template <int N>
class TaskSums {
 public:
  static constexpr int BUFFERS = 2 * N;

  TaskSums(const Buffers& buffers, int first, int64_t D) : D_(D) {
    for (int i = 0; i < N; ++i) {
      run_[i] = buffers[first + i];
      total_[i] = buffers[first + N + i];
      std::fill_n(run_[i], D, 0.0f);
    }
  }

  // where a row is added
  float* operator[](int i) const { return run_[i]; }

  // each sum has one row more
  void count_row() {
    if (++rows_ == RUN) end_run();
  }

  const std::array<float*, N>& finish() {
    if (!has_total_) return run_;
    end_run();
    return total_;
  }

 private:
  void end_run() {
    for (int i = 0; i < N; ++i) {
      if (has_total_) {
        add_row(run_[i], D_, total_[i]);
      } else {
        std::copy_n(run_[i], D_, total_[i]);
      }
      std::fill_n(run_[i], D_, 0.0f);
    }
    rows_ = 0;
    has_total_ = true;
  }

  int64_t D_, rows_ = 0;
  bool has_total_ = false;
  std::array<float*, N> run_, total_;
};

// N sums of each sample, and the rows they go to; a sum without rows is dropped.
template <int N>
class SampleSums {
 public:
  SampleSums(const Cut& cut, int64_t D, const Tensor& like, const std::array<Rows, N>& outs)
      : samples_(cut.samples()), splits_(cut.splits()), D_(D), outs_(outs) {
    if (splits_ == 1) return;
    partial_ = torch::stable::new_empty(like, {N, samples_ * splits_, D}, ScalarType::Float);
  }

  void write(const Task& task, const std::array<float*, N>& sums) const {
    for (int i = 0; i < N; ++i) {
      if (splits_ > 1) {
        std::copy_n(sums[i], D_, partial(i, task.index));
      } else if (outs_[i]) {
        outs_[i].write(task.sample, sums[i]);
      }
    }
  }

  void finish() const {
    if (splits_ == 1) return;
    const int64_t grain = std::max<int64_t>(GRAIN / (splits_ * D_), 1);
    torch::stable::parallel_for(0, N * samples_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) add_up(k / samples_, k % samples_);
    });
  }

 private:
  float* partial(int64_t i, int64_t task) const {
    return static_cast<float*>(partial_->data_ptr()) + (i * samples_ * splits_ + task) * D_;
  }

  // into the first of a sample's partial sums
  void add_up(int64_t i, int64_t sample) const {
    float* total = partial(i, sample * splits_);
    for (int64_t split = 1; split < splits_; ++split) add_row(total + split * D_, D_, total);
    if (outs_[i]) outs_[i].write(sample, total);
  }

  int64_t samples_, splits_, D_;
  std::array<Rows, N> outs_;
  std::optional<Tensor> partial_;
};

}  // namespace dbkernels
