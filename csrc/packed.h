/* Where things lie in a packed weight matrix. The one place that knows; every kernel and the packer ask here.
 *
 * Outputs come in tiles of 16. A vector of 64 bytes holds the same few inputs of all 16 outputs of a tile, output by
 * output: what vpdpbusd multiplies lane by lane, and what a row of an AMX B tile is.
 *   KQ_INT8  codes [tiles][k_padded / 4][16][4]: code + 128 as uint8; then scales fp32 [tiles][16]
 *   KQ_INT4  codes [tiles][k_padded / 8][16][4]: byte j has input 8 v + j in its low nibble and 8 v + 4 + j in its
 *            high one, 0..15; then scales fp16 [tiles][groups][16]; then, with zeros, zeros uint8 [tiles][groups][16]
 *   KQ_BF16  values [tiles][k_padded / 2][16][2]
 * k is padded to a multiple of 64 (KQ_INT4: with groups of scale 0), n to 16; padding multiplies to zero. */
#pragma once
#include <cstdint>

#include "kernels.h"

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
/* Bytes between two rows of `values` one-byte codes: an odd number of cache lines, or else the same column of many rows
 * would fall in the same few sets of the first cache. */
inline int64_t code_stride(int64_t values) { return (round_up(values, 64) / 64 | 1) * 64; }
/* Bytes of a row of x that is rounded for w. */
inline int64_t rounded_bytes(const kq_weight *w) {
    return code_stride(w->kind == KQ_BF16 ? 2 * round_up(w->k, 64) : w->k);
}
/* Rows first..last-1 of x alone. */
inline Activations rows_of(const kq_weight *w, const Activations *x, int64_t first, int64_t last) {
    Activations part = *x;
    part.rows = last - first;
    part.x += first * x->ldx;
    if (!x->codes) return part;
    part.codes += first * rounded_bytes(w);
    part.scales += first * x->groups;
    part.sums += first * x->groups;
    return part;
}
inline int64_t num_tiles(const kq_weight *w) { return (w->n + kTile - 1) / kTile; }
inline int64_t padded_k(const kq_weight *w) { return round_up(w->k, 64); }
/* Groups of a row, those of the padding included; activations have only the k / group real ones. */
inline int64_t num_groups(const kq_weight *w) { return w->group ? (padded_k(w) + w->group - 1) / w->group : 1; }

inline int64_t tile_bytes(const kq_weight *w) {
    const int64_t values = kTile * padded_k(w);
    return w->kind == KQ_BF16 ? 2 * values : w->kind == KQ_INT8 ? values : values / 2;
}
inline int64_t scales_offset(const kq_weight *w) { return num_tiles(w) * tile_bytes(w); }
inline int64_t zeros_offset(const kq_weight *w) {
    const int64_t scales = num_tiles(w) * kTile * num_groups(w) * (w->kind == KQ_INT4 ? 2 : 4);
    return scales_offset(w) + round_up(scales, 64);
}

inline const uint8_t *tile_codes(const kq_weight *w, int64_t tile) {
    return static_cast<const uint8_t *>(w->packed) + tile * tile_bytes(w);
}
/* KQ_INT8: fp32 [16]. */
inline const float *tile_scales_f32(const kq_weight *w, int64_t tile) {
    return reinterpret_cast<const float *>(static_cast<const uint8_t *>(w->packed) + scales_offset(w)) + tile * kTile;
}
/* KQ_INT4: fp16 [groups][16]. */
inline const uint16_t *tile_scales_f16(const kq_weight *w, int64_t tile) {
    return reinterpret_cast<const uint16_t *>(static_cast<const uint8_t *>(w->packed) + scales_offset(w)) +
           tile * kTile * num_groups(w);
}
/* KQ_INT4 with zeros: uint8 [groups][16]. */
inline const uint8_t *tile_zeros(const kq_weight *w, int64_t tile) {
    return static_cast<const uint8_t *>(w->packed) + zeros_offset(w) + tile * kTile * num_groups(w);
}
inline int64_t packed_bytes(const kq_weight *w) {
    if (w->kind == KQ_BF16) return scales_offset(w);
    const int64_t zeros = w->has_zeros ? num_tiles(w) * kTile * num_groups(w) : 0;
    return zeros_offset(w) + round_up(zeros, 64);
}

/* fp32 to fp16, half to even. Beyond its range: infinite. */
inline uint16_t to_f16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    uint32_t mantissa = (size & 0x7fffff) | 0x800000, shift = 13, exponent = size >> 23, base = 0;
    if (exponent < 113) {  // below fp16's normal range
        shift = 126 - exponent;
        if (shift > 24) return static_cast<uint16_t>(sign);
    } else {
        base = (exponent - 113) << 10;  // the hidden bit adds the missing one to the exponent
    }
    const uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
    return static_cast<uint16_t>(sign | (base + kept + (rest > half || (rest == half && (kept & 1)))));
}

inline float from_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) * (1.0f / 16777216.0f);
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
