/* Activation rounding and matrix products over packed tiles. Compiled once per instruction set. */
#pragma once
#include "kernels.h"
#include "packed.h"
#include "simd.h"

namespace {

void quantize_rows(const float *, int64_t, const int32_t *, int64_t, int64_t, int64_t, int64_t, int8_t *, float *,
                   int32_t *) {
    __builtin_trap();
}

void linear_tiles(const kq_weight *, const Activations *, int64_t, int64_t, float *, int64_t, int32_t, void *) {
    __builtin_trap();
}

}  // namespace
