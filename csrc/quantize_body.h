/* Rounding of activations to int8. Compiled once per instruction set. */
#pragma once
#include "kernels.h"
#include "packed.h"
#include "simd.h"

namespace {

// Rows smaller than this are zero: 127 / absmax must stay finite with denormals flushed.
constexpr float kSmallest = 1e-30f;

/* codes[i] = round(x[i] * (127 / absmax)), half to even; the sum of the codes; absmax / 127 is returned. `size` inputs,
 * of which whole vectors and a tail. Sizes are compared as integers, where a NaN is the largest: it reaches the scale. */
float quantize_span(const float *x, const int32_t *order, const float *base, int64_t size, int8_t *codes, int32_t *sum) {
    const int64_t whole = size / 16 * 16, rest = size - whole;
    I largest = i_zero();
    for (int64_t i = 0; i < whole; i += 16) {
        largest = i_max(largest, i_bits(f_abs(order ? f_gather(base, order + i) : f_load(x + i))));
    }
    float tail[16] = {};
    for (int64_t i = 0; i < rest; i++) tail[i] = order ? base[order[whole + i]] : x[whole + i];
    largest = i_max(largest, i_bits(f_abs(f_load(tail))));
    const int32_t bits = i_largest(largest);
    float absmax;
    __builtin_memcpy(&absmax, &bits, 4);
    const bool is_zero = absmax < kSmallest;
    const F inverse = f_set(is_zero ? 0.0f : 127.0f / absmax);
    I total = i_zero();
    for (int64_t i = 0; i < whole; i += 16) {
        const I code = i_from_f((order ? f_gather(base, order + i) : f_load(x + i)) * inverse);
        i_store_i8(codes + i, code);
        total = total + code;
    }
    if (rest) {
        int8_t last[16];
        const I code = i_from_f(f_load(tail) * inverse);
        i_store_i8(last, code);
        for (int64_t i = 0; i < rest; i++) codes[whole + i] = last[i];
        total = total + code;
    }
    *sum = i_sum(total);
    return is_zero ? 0.0f : absmax / 127.0f;
}

void quantize_rows(const float *x, int64_t ldx, const int32_t *order, int64_t k, int64_t group, int64_t first,
                   int64_t last, int8_t *codes, float *scales, int32_t *sums) {
    const int64_t k_padded = round_up(k, 64), stride = code_stride(k), size = group ? group : k, groups = k / size;
    for (int64_t m = first; m < last; m++) {
        const float *row = x + m * ldx;
        int8_t *out = codes + m * stride;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = g * size;
            scales[m * groups + g] = quantize_span(row + at, order ? order + at : nullptr, row, size, out + at,
                                                   sums + m * groups + g);
        }
        for (int64_t i = k; i < k_padded; i++) out[i] = 0;
    }
}

}  // namespace
