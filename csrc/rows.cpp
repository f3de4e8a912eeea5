// Rows of D elements as float32; see rows.h.
#include "rows.h"

#include "element.h"
#include "wide.h"

namespace dbkernels {
namespace {

DBK_WIDE void load_as(const float* x, int64_t count, float* y) { load(x, count, y); }
DBK_WIDE void load_as(const BFloat16* x, int64_t count, float* y) { load(x, count, y); }
DBK_WIDE void load_as(const Float16* x, int64_t count, float* y) { load(x, count, y); }

DBK_WIDE void store_as(const float* x, int64_t count, float* y) { store(x, count, y); }
DBK_WIDE void store_as(const float* x, int64_t count, BFloat16* y) { store(x, count, y); }
DBK_WIDE void store_as(const float* x, int64_t count, Float16* y) { store(x, count, y); }

}  // namespace

void load_row(const void* x, ScalarType dtype, int64_t count, float* y) {
  with_element(dtype, [&](auto element) {
    load_as(static_cast<const decltype(element)*>(x), count, y);
  });
}

void store_row(const float* x, ScalarType dtype, int64_t count, void* y) {
  with_element(dtype, [&](auto element) {
    store_as(x, count, static_cast<decltype(element)*>(y));
  });
}

DBK_WIDE void add_row(const float* x, int64_t count, float* total) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) total[i] += x[i];
}

}  // namespace dbkernels
