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
inline int64_t num_tiles(const kq_weight *w) { return (w->n + kTile - 1) / kTile; }
inline int64_t padded_k(const kq_weight *w) { return round_up(w->k, 64); }
/* Groups of a row, those of the padding included. */
inline int64_t num_groups(const kq_weight *w) { return w->group ? padded_k(w) / w->group + (padded_k(w) % w->group != 0) : 1; }

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
