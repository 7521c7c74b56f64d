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

/* y = gate / (1 + exp(-gate)) * up. Gates below -100 are as good as that: f_exp ends at exp(88.7). */
void swiglu_row(const float *gate, const float *up, int64_t size, float *y) {
    for (int64_t i = 0; i < size; i += 16) {
        const int64_t count = size - i < 16 ? size - i : 16;
        const bool whole = count == 16;
        const F g = f_max(f_set(-100.0f), whole ? f_load(gate + i) : f_load_some(gate + i, count));
        const F u = whole ? f_load(up + i) : f_load_some(up + i, count);
        const F out = f_div(g, f_set(1.0f) + f_exp(f_zero() - g)) * u;
        if (whole) f_store(y + i, out);
        else f_store_some(y + i, out, count);
    }
}

}  // namespace
