/* Rotation, cache writes and paged attention. Compiled once per instruction set. */
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

void write_row(const kq_cache *, const kq_places *, int64_t, int64_t, float *, const float *, const float *, float) {
    __builtin_trap();
}

void attend_rows(const kq_cache *, const kq_span *, int64_t, int64_t, int64_t, const float *, int32_t, float *, void *) {
    __builtin_trap();
}

}  // namespace
