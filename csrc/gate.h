// The gated residual of one row; the maths is in dbkernels/ops/gated_residual.py.
//
// Elements are read before they are written, so y may lie on x and dh on h.
#pragma once

#include <cstdint>

namespace dbkernels {

void add_gated(const float* x, const float* h, const float* gate, int64_t D, float* y);

// dh, and its share of dgate
void gate_backward(
    const float* dy, const float* h, const float* gate, int64_t D, float* dh, float* dgate);

}  // namespace dbkernels
