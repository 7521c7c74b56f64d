/* Matrix products over packed tiles. Compiled once per instruction set. */
#pragma once
#include "kernels.h"
#include "packed.h"
#include "simd.h"

#define KQ_UNROLL _Pragma("GCC unroll 16")  // arrays that these loops index become registers

namespace {

/* What a block of R rows and T tiles multiplies. out: fp32 [R][T][16]. */
struct Block {
    const kq_weight *w;
    const Activations *x;
    int64_t tile, row;
    float *out;
    // KQ_INT4 only: groups first..last-1 (those before are in `out`), their codes as bytes, [T][inputs / 4][16][4], or
    // null where they are to be unpacked on the way, and the packed codes of T tiles that will be unpacked next.
    int64_t first, last;
    const uint8_t *panel, *next;
};

// Blocks as large as the registers hold: up to kFewRows rows of kMaxTiles tiles, or kMaxRows of kTilesOfMany.
#if defined(__AVX512F__)
constexpr int kMaxRows = 12, kTilesOfMany = 2, kFewRows = 4, kMaxTiles = 4;
#else
constexpr int kMaxRows = 4, kTilesOfMany = 1, kFewRows = 4, kMaxTiles = 2;
#endif

constexpr int64_t kPanelInputs = 512;  // inputs that are unpacked at a time: two tiles of them fill a third of L1
constexpr int64_t kRowsOfPanel = 144;    // rows whose sums fit L1 beside the panel

/* How far from place `at` of a tile the line lies that is to be asked for now, 4 KB ahead of each of several streams or
 * 8 KB of one: in the same tile, or in the one that follows the tiles that are read together. */
inline int64_t ahead(int64_t at, int64_t tile_size, int64_t tiles) {
    const int64_t bytes = tiles == 1 ? 8192 : 4096;
    return bytes + (at + bytes < tile_size ? 0 : (tiles - 1) * tile_size);
}

/* out[r, t] = sum_g (sx[r, g] * sw[t, g]) * (sum_{i in g} code[t, i] * x[r, i] - zero[t, g] * sum x[r, g]).
 * g outside, then eight inputs, then tiles, then rows: a vector of weights serves R rows and four inputs T tiles. */
template <int R, int T, bool FromPanel>
void int4_block(const Block *b) {
    const kq_weight *w = b->w;
    const Activations *x = b->x;
    const int64_t groups = x->groups, sets = num_groups(w), steps = w->group / 8, ld = code_stride(x->k);
    const int64_t tile_size = tile_bytes(w), stride = FromPanel ? kPanelInputs * kTile : tile_size;
    const uint8_t *codes = FromPanel ? b->panel : tile_codes(w, b->tile);
    const uint8_t *next = b->next;
    const uint16_t *sw = tile_scales_f16(w, b->tile);
    const uint8_t *zeros = tile_zeros(w, b->tile);
    const int8_t *xq = x->codes + b->row * ld + b->first * w->group;
    const float *sx = x->scales + b->row * groups;
    const int32_t *sums = x->sums + b->row * groups;
    const I nibble = i_set(0x0f0f0f0f);
    for (int64_t g = b->first; g < b->last; g++) {
        if (!FromPanel) next = codes + ahead(g * steps * 64, tile_size, T);
        I acc[R][T];
        KQ_UNROLL for (int r = 0; r < R; r++) {
            KQ_UNROLL for (int t = 0; t < T; t++) {
                if (!w->has_zeros) acc[r][t] = i_set(-8 * sums[r * groups + g]);
                else acc[r][t] = i_pairs(i_load_u8(zeros + (t * sets + g) * kTile), i_set(-sums[r * groups + g] & 0xffff));
            }
        }
        for (int64_t v = 0; v < steps; v++) {
            I lo[T], hi[T];
            KQ_UNROLL for (int t = 0; t < T; t++) {
                if (FromPanel) {
                    lo[t] = i_load(codes + t * stride);
                    hi[t] = i_load(codes + t * stride + 64);
                    __builtin_prefetch(next + t * tile_size);
                } else {
                    const I both = i_load(codes + t * stride);
                    __builtin_prefetch(next + t * stride);
                    lo[t] = both & nibble;
                    hi[t] = i_shift_right(both, 4) & nibble;
                }
            }
            if constexpr (R > 10) {  // one half after the other: both would not fit the registers
                KQ_UNROLL for (int r = 0; r < R; r++) {
                    const I x_lo = i_four(xq + r * ld);
                    KQ_UNROLL for (int t = 0; t < T; t++) acc[r][t] = i_dot_u8s8(acc[r][t], lo[t], x_lo);
                }
                KQ_UNROLL for (int r = 0; r < R; r++) {
                    const I x_hi = i_four(xq + r * ld + 4);
                    KQ_UNROLL for (int t = 0; t < T; t++) acc[r][t] = i_dot_u8s8(acc[r][t], hi[t], x_hi);
                }
            } else {
                KQ_UNROLL for (int r = 0; r < R; r++) {
                    const I x_lo = i_four(xq + r * ld), x_hi = i_four(xq + r * ld + 4);
                    KQ_UNROLL for (int t = 0; t < T; t++) {
                        acc[r][t] = i_dot_nibbles(acc[r][t], lo[t], hi[t], x_lo, x_hi);
                    }
                }
            }
            codes += FromPanel ? 128 : 64;
            next += 64;
            xq += 8;
        }
        KQ_UNROLL for (int t = 0; t < T; t++) {
            const F scale = f_load_f16(sw + (t * sets + g) * kTile);
            KQ_UNROLL for (int r = 0; r < R; r++) {
                float *out = b->out + (r * T + t) * kTile;
                const F before = g ? f_load(out) : f_zero();
                f_store(out, f_fma(f_from_i(acc[r][t]), scale * f_set(sx[r * groups + g]), before));
            }
        }
    }
}

/* out[r, t] = (sx[r] * sw[t]) * (sum_i (code[t, i] + 128) * x[r, i] - 128 * sum x[r]). Four inputs, tiles, rows. */
template <int R, int T>
void int8_block(const Block *b) {
    const kq_weight *w = b->w;
    const Activations *x = b->x;
    const int64_t ld = code_stride(x->k), stride = tile_bytes(w);
    const uint8_t *codes = tile_codes(w, b->tile);
    const int8_t *xq = x->codes + b->row * ld;
    I acc[R][T];
    KQ_UNROLL for (int r = 0; r < R; r++) {
        const I start = i_set(kDotsAreSigned ? 0 : -128 * x->sums[b->row + r]);
        KQ_UNROLL for (int t = 0; t < T; t++) acc[r][t] = start;
    }
    for (int64_t i = 0; i < x->k_padded; i += 64) {
        const int64_t far = ahead(i * kTile, stride, T);
        for (int v = 0; v < 16; v++) {
            W four[T];
            KQ_UNROLL for (int t = 0; t < T; t++) {
                four[t] = w_load(codes + t * stride);
                __builtin_prefetch(codes + t * stride + far);
            }
            KQ_UNROLL for (int r = 0; r < R; r++) {
                const I xs = i_four(xq + r * ld);
                KQ_UNROLL for (int t = 0; t < T; t++) acc[r][t] = i_dot_weights(acc[r][t], four[t], xs);
            }
            codes += 64;
            xq += 4;
        }
    }
    KQ_UNROLL for (int t = 0; t < T; t++) {
        const F scale = f_load(tile_scales_f32(w, b->tile + t));
        KQ_UNROLL for (int r = 0; r < R; r++) {
            f_store(b->out + (r * T + t) * kTile, f_from_i(acc[r][t]) * (scale * f_set(x->scales[b->row + r])));
        }
    }
}

/* out[r, t] = sum_i w[t, i] * x[r, i], in the order of i. Two inputs, tiles, rows. */
template <int R, int T>
void bf16_block(const Block *b) {
    const kq_weight *w = b->w;
    const int64_t ld = b->x->ldx, stride = tile_bytes(w), k = b->x->k;
    const uint8_t *pairs = tile_codes(w, b->tile);
    const float *x = b->x->x + b->row * ld;
    F acc[R][T];
    KQ_UNROLL for (int r = 0; r < R; r++) {
        KQ_UNROLL for (int t = 0; t < T; t++) acc[r][t] = f_zero();
    }
    for (int64_t i = 0; i < k / 2; i += 16) {
        const int64_t far = ahead(i * 64, stride, T), count = k / 2 - i < 16 ? k / 2 - i : 16;
        for (int64_t v = 0; v < count; v++) {
            F even[T], odd[T];
            KQ_UNROLL for (int t = 0; t < T; t++) {
                const I both = i_load(pairs + t * stride);
                __builtin_prefetch(pairs + t * stride + far);
                even[t] = f_bf16_low(both);
                odd[t] = f_bf16_high(both);
            }
            KQ_UNROLL for (int r = 0; r < R; r++) {
                const F first = f_set(x[r * ld]), second = f_set(x[r * ld + 1]);
                KQ_UNROLL for (int t = 0; t < T; t++) acc[r][t] = f_fma(odd[t], second, f_fma(even[t], first, acc[r][t]));
            }
            pairs += 64;
            x += 2;
        }
    }
    KQ_UNROLL for (int r = 0; r < R; r++) {
        KQ_UNROLL for (int t = 0; t < T; t++) {
            // The last of an odd number of inputs stands alone.
            if (k % 2) acc[r][t] = f_fma(f_bf16_low(i_load(pairs + t * stride)), f_set(x[r * ld]), acc[r][t]);
            f_store(b->out + (r * T + t) * kTile, acc[r][t]);
        }
    }
}

enum Source { kNibbles, kPanel, kBytes, kFloats };

template <int S, int R, int T>
void one_block(const Block *b) {
    if constexpr (S == kNibbles) int4_block<R, T, false>(b);
    else if constexpr (S == kPanel) int4_block<R, T, true>(b);
    else if constexpr (S == kBytes) int8_block<R, T>(b);
    else bf16_block<R, T>(b);
}

/* The block of `rows` rows: one copy of the code for each number, so that accumulators are registers. */
template <int S, int T, int R = T == kMaxTiles ? kFewRows : kMaxRows>
void run_block(const Block *b, int64_t rows) {
    if (rows == R) return one_block<S, R, T>(b);
    if constexpr (R > 1) run_block<S, T, R - 1>(b, rows);
}

template <int S, int T = S == kPanel ? kTilesOfMany : kMaxTiles>
void run_tiles(const Block *b, int64_t rows, int64_t tiles) {
    if (tiles == T) return run_block<S, T>(b, rows);
    if constexpr (T > 1) run_tiles<S, T / 2>(b, rows, tiles);
}

/* The 16 columns of each of `tiles` tiles and `rows` rows of `out` to y, bias added; columns beyond n are left. */
void finish(const Block *b, int64_t rows, int64_t tiles, float *y, int64_t ldy, int32_t accumulate) {
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t column = (b->tile + t) * kTile;
        const int64_t count = b->w->n - column < kTile ? b->w->n - column : kTile;
        const F bias = b->w->bias ? f_load_some(b->w->bias + column, count) : f_zero();
        for (int64_t r = 0; r < rows; r++) {
            float *to = y + r * ldy + t * kTile;
            F value = f_load(b->out + (r * tiles + t) * kTile) + bias;
            if (accumulate) value = value + f_load_some(to, count);
            f_store_some(to, value, count);
        }
    }
}

/* `count` inputs from `from` on of `tiles` tiles, as bytes: [tiles][kPanelInputs / 4][16][4]. */
void unpack_panel(const kq_weight *w, int64_t tile, int64_t tiles, int64_t from, int64_t count, uint8_t *panel) {
    const I nibble = i_set(0x0f0f0f0f);
    for (int64_t t = 0; t < tiles; t++) {
        const uint8_t *codes = tile_codes(w, tile + t) + from * 8;
        uint8_t *out = panel + t * kPanelInputs * kTile;
        for (int64_t at = 0; at < count * 8; at += 64) {
            const I both = i_load(codes + at);
            i_store(out + 2 * at, both & nibble);
            i_store(out + 2 * at + 64, i_shift_right(both, 4) & nibble);
        }
    }
}

/* The block of rows number i of `blocks`, all of nearly one size. */
struct Rows { int64_t first, count; };
Rows rows_of_block(int64_t rows, int64_t blocks, int64_t i) {
    const int64_t first = rows * i / blocks;
    return {first, rows * (i + 1) / blocks - first};
}

/* One or two tiles of int4 times many rows: some inputs are unpacked once and multiplied by all rows. */
void panel_tiles(const kq_weight *w, const Activations *x, int64_t tile, int64_t tiles, float *y, int64_t ldy,
                 int32_t accumulate, void *scratch) {
    auto *panel = static_cast<uint8_t *>(scratch);
    auto *sums = reinterpret_cast<float *>(panel + kTilesOfMany * kPanelInputs * kTile);
    const int64_t blocks = (x->rows + kMaxRows - 1) / kMaxRows, inputs = x->groups * w->group;
    for (int64_t from = 0; from < inputs; from += kPanelInputs) {
        const int64_t count = inputs - from < kPanelInputs ? inputs - from : kPanelInputs;
        const bool is_last = from + count == inputs;
        unpack_panel(w, tile, tiles, from, count, panel);
        for (int64_t i = 0; i < blocks; i++) {
            const Rows rows = rows_of_block(x->rows, blocks, i);
            const uint8_t *next = is_last ? tile_codes(w, tile + tiles) : tile_codes(w, tile) + (from + count) * 8;
            float *out = sums + rows.first * tiles * kTile;
            const Block block{w, x, tile, rows.first, out, from / w->group, (from + count) / w->group, panel, next};
            run_tiles<kPanel>(&block, rows.count, tiles);
            if (is_last) finish(&block, rows.count, tiles, y + rows.first * ldy, ldy, accumulate);
        }
    }
}

/* Few rows, or weights that need no unpacking: blocks of rows, each against whole tiles. */
void whole_tiles(const kq_weight *w, const Activations *x, int64_t tile, int64_t tiles, float *y, int64_t ldy,
                 int32_t accumulate, void *scratch) {
    const int64_t blocks = (x->rows + kMaxRows - 1) / kMaxRows;
    for (int64_t i = 0; i < blocks; i++) {
        const Rows rows = rows_of_block(x->rows, blocks, i);
        const Block block{w, x, tile, rows.first, static_cast<float *>(scratch), 0, x->groups, nullptr, nullptr};
        if (w->kind == KQ_INT4) run_tiles<kNibbles>(&block, rows.count, tiles);
        else if (w->kind == KQ_INT8) run_tiles<kBytes>(&block, rows.count, tiles);
        else run_tiles<kFloats>(&block, rows.count, tiles);
        finish(&block, rows.count, tiles, y + rows.first * ldy, ldy, accumulate);
    }
}

void linear_tiles(const kq_weight *w, const Activations *x, int64_t first, int64_t last, float *y, int64_t ldy,
                  int32_t accumulate, void *scratch) {
    const bool panels = w->kind == KQ_INT4 && x->rows > kMaxRows;
    const int64_t parts = panels ? (x->rows + kRowsOfPanel - 1) / kRowsOfPanel : 1;
    for (int64_t i = 0; i < parts; i++) {
        const Rows rows = rows_of_block(x->rows, parts, i);
        const Activations part = rows_of(w, x, rows.first, rows.first + rows.count);
        for (int64_t tile = first; tile < last;) {
            const int64_t left = last - tile;
            const int64_t widest = part.rows <= kFewRows ? kMaxTiles : kTilesOfMany;
            const int64_t tiles = left >= widest ? widest : left >= kTilesOfMany ? kTilesOfMany : 1;
            float *to = y + rows.first * ldy + (tile - first) * kTile;
            (panels ? panel_tiles : whole_tiles)(w, &part, tile, tiles, to, ldy, accumulate, scratch);
            tile += tiles;
        }
    }
}

}  // namespace
