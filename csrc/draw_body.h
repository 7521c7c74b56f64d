/* Passes over one row of logits, for draw.cpp. Compiled once per instruction set. */
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

/* The largest of x, and of each block of kDrawBlock numbers; NaN if x holds one. */
float block_peaks(const float *x, int64_t size, float *peaks) {
    const I magnitude = i_set(0x7fffffff);
    I largest_bits = i_zero();
    float peak = -__builtin_inff();
    for (int64_t block = 0; block * kDrawBlock < size; block++) {
        const int64_t first = block * kDrawBlock, last = first + kDrawBlock < size ? first + kDrawBlock : size;
        F best = f_set(-__builtin_inff());
        int64_t i = first;
        for (; i + 16 <= last; i += 16) {
            const F v = f_load(x + i);
            largest_bits = i_max(largest_bits, i_bits(v) & magnitude);
            best = f_max(best, v);
        }
        float most = f_largest(best);
        for (; i < last; i++) {
            if (x[i] != x[i]) return __builtin_nanf("");
            if (x[i] > most) most = x[i];
        }
        peaks[block] = most;
        if (most > peak) peak = most;
    }
    return i_largest(largest_bits) > 0x7f800000 ? __builtin_nanf("") : peak;  // what infinity's bits are
}

/* w = exp((x - peak) * inverse); their sum. */
double tempered(const float *x, int64_t size, float peak, float inverse, float *w) {
    double total = 0;
    for (int64_t first = 0; first < size; first += 1024) {
        const int64_t last = first + 1024 < size ? first + 1024 : size;
        F sum = f_zero();
        int64_t i = first;
        for (; i + 16 <= last; i += 16) {
            const F e = f_exp((f_load(x + i) - f_set(peak)) * f_set(inverse));
            f_store(w + i, e);
            sum = sum + e;
        }
        total += f_sum(sum);
        if (i < last) {
            float rest[16] = {};
            const F e = f_exp((f_load_some(x + i, last - i) - f_set(peak)) * f_set(inverse));
            f_store(rest, e);
            for (int64_t j = 0; i + j < last; j++) total += w[i + j] = rest[j];
        }
    }
    return total;
}

/* The largest of each block of kDrawBlock weights is at least `floor`: their places, ascending; how many. */
int64_t places_from(const float *w, int64_t size, float floor, int32_t *places) {
    int64_t count = 0;
    for (int64_t first = 0; first < size; first += 16) {
        const int64_t last = first + 16 < size ? first + 16 : size;
        if (last - first == 16 && f_largest(f_load(w + first)) < floor) continue;
        for (int64_t i = first; i < last; i++) {
            places[count] = static_cast<int32_t>(i);
            count += w[i] >= floor;
        }
    }
    return count;
}

/* to[j] += from[j] */
void add_row(const float *from, int64_t size, float *to) {
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) f_store(to + i, f_load(to + i) + f_load(from + i));
    for (; i < size; i++) to[i] += from[i];
}

}  // namespace
