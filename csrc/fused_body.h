/* Norms and activations of one row. Compiled once per instruction set. */
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

/* y = x / sqrt(mean(x^2) + eps) * weight. */
void rms_norm_row(const float *x, const float *weight, float eps, int64_t size, float *y) {
    F sum = f_zero();
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) sum = f_fma(f_load(x + i), f_load(x + i), sum);
    float total = f_sum(sum);
    for (; i < size; i++) total += x[i] * x[i];
    const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(size) + eps);
    for (i = 0; i + 16 <= size; i += 16) f_store(y + i, f_load(x + i) * f_set(scale) * f_load(weight + i));
    for (; i < size; i++) y[i] = x[i] * scale * weight[i];
}

/* y = gate / (1 + exp(-gate)) * up. */
void swiglu_row(const float *gate, const float *up, int64_t size, float *y) {
    for (int64_t i = 0; i < size; i++) y[i] = gate[i] / (1.0f + __builtin_expf(-gate[i])) * up[i];
}

}  // namespace
