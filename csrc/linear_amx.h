/* Matrix products over packed tiles with the matrix unit, for many rows of activations.
 *
 * A packed tile is already what the unit wants: 64 bytes are four (int) or two (bf16) inputs of 16 outputs, and 16 such
 * vectors are one right operand. Formula, for each group g of inputs (one for KQ_INT8):
 *     y[m, n] = sum over g of sx[m, g] * sw[n, g] * dot(x[m, g], w[n, g] - zero[n, g])
 * with the integer part exact. Loop order, outside in: up to kPanelRows rows, up to kPanelTiles tiles of outputs, blocks
 * of kBlock inputs, 32 rows (their codes of one block fit the first cache), 32 outputs (2 x 2 result tiles), inputs. */
#pragma once
#include "amx.h"
#include "kernels.h"
#include "linear_body.h"
#include "packed.h"

namespace {

constexpr int64_t kPanelRows = 512, kPanelTiles = 16;
constexpr int64_t kBlock = 512;       // inputs
constexpr int64_t kSquare = 16 * 16;  // values of a result tile

/* One block of a panel: what a result needs beside its operands. */
struct Panel {
    const kq_weight *w;
    const Activations *x;
    int64_t first_row, rows;    // of x
    int64_t first, last;        // tiles of w
    float *y;                   // column of tile `first`, row 0 of x
    int64_t ldy;
    int32_t accumulate;
    uint8_t *results;           // [rows / 32][tiles / 2][4][16][16] int32 or fp32: sums of the blocks before
    uint8_t *scratch;
};

/* y[row, tile] = value + bias, or += for accumulate. */
inline void put(const Panel &p, int64_t row, int64_t tile, F value) {
    const int64_t column = tile * kTile, left = p.w->n - column;
    float *y = p.y + row * p.ldy + column - p.first * kTile;
    if (left >= kTile) {
        if (p.w->bias) value = value + f_load(p.w->bias + column);
        f_store(y, p.accumulate ? f_load(y) + value : value);
        return;
    }
    if (p.w->bias) value = value + f_load_some(p.w->bias + column, left);
    f_store_some(y, p.accumulate ? f_load_some(y, left) + value : value, left);
}

inline uint8_t *results_of(const Panel &p, int64_t row, int64_t tile) {
    const int64_t pairs = (p.last - p.first + 1) / 2;
    return p.results + ((row - p.first_row) / 32 * pairs + (tile - p.first) / 2) * 4 * kSquare * 4;
}

/* The operands of a run of inputs for 32 rows and two tiles, `steps` tiles deep. */
struct Operands {
    const uint8_t *a0, *a1;  // rows 0..15 and 16..31, or a1 = a0 where there are no more than 16
    int64_t stride, a_step;  // bytes between rows, and between two steps
    const uint8_t *b0, *b1;
    int64_t b_step;
};

enum Dot { kS8U8, kS8S8, kBf16 };

template <Dot kDot, bool kBottom>
inline void multiply(const Operands &o, int64_t steps) {
#define DOT(c, a, b)                                       \
    do {                                                   \
        if (kDot == kS8U8) TILE_DOT_S8U8(c, a, b);         \
        else if (kDot == kS8S8) TILE_DOT_S8S8(c, a, b);    \
        else TILE_DOT_BF16(c, a, b);                       \
    } while (0)
    const uint8_t *a0 = o.a0, *a1 = o.a1, *b0 = o.b0, *b1 = o.b1;
    for (int64_t s = 0; s < steps; s++) {
        TILE_LOAD(4, a0, o.stride);
        TILE_LOAD(6, b0, 64);
        DOT(0, 4, 6);
        TILE_LOAD(7, b1, 64);
        DOT(1, 4, 7);
        if (kBottom) {
            TILE_LOAD(5, a1, o.stride);
            DOT(2, 5, 6);
            DOT(3, 5, 7);
        }
        a0 += o.a_step;
        a1 += o.a_step;
        b0 += o.b_step;
        b1 += o.b_step;
    }
#undef DOT
}

inline void zero_results() {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
}
inline void load_results(const uint8_t *p) {
    TILE_LOAD(0, p, 64);
    TILE_LOAD(1, p + 1024, 64);
    TILE_LOAD(2, p + 2048, 64);
    TILE_LOAD(3, p + 3072, 64);
}
inline void store_results(uint8_t *p) {
    TILE_STORE(0, p, 64);
    TILE_STORE(1, p + 1024, 64);
    TILE_STORE(2, p + 2048, 64);
    TILE_STORE(3, p + 3072, 64);
}

/* Final values of 32 rows and two tiles from the result tiles in memory. */
inline void finish_int8(const Panel &p, int64_t row, int64_t rows, int64_t tile, const uint8_t *results) {
    for (int64_t side = 0; side < 2 && tile + side < p.last; side++) {
        const F scales = f_load(tile_scales_f32(p.w, tile + side));
        for (int64_t r = 0; r < rows; r++) {
            const I dots = i_load(results + ((r / 16 * 2 + side) * kSquare + r % 16 * 16) * 4);
            const I exact = dots - i_set(128 * p.x->sums[row + r]);
            put(p, row + r, tile + side, f_from_i(exact) * (scales * f_set(p.x->scales[row + r])));
        }
    }
}
inline void finish_f32(const Panel &p, int64_t row, int64_t rows, int64_t tile, const uint8_t *results) {
    for (int64_t side = 0; side < 2 && tile + side < p.last; side++)
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *from = results + ((r / 16 * 2 + side) * kSquare + r % 16 * 16) * 4;
            put(p, row + r, tile + side, f_load(reinterpret_cast<const float *>(from)));
        }
}

/* KQ_INT8 and KQ_BF16: inputs from..to-1 of 32 rows (a: their codes from `from` on) and all tiles of the panel. */
template <Dot kDot, bool kBottom>
void row_block(const Panel &p, int64_t row, int64_t rows, int64_t from, int64_t to, const uint8_t *a, int64_t stride) {
    const int64_t size = kDot == kBf16 ? 2 : 1, k = padded_k(p.w);
    for (int64_t tile = p.first; tile < p.last; tile += 2) {
        const uint8_t *b0 = tile_codes(p.w, tile) + from * kTile * size;
        const uint8_t *b1 = tile + 1 < p.last ? b0 + tile_bytes(p.w) : b0;
        uint8_t *results = results_of(p, row, tile);
        if (from) load_results(results);
        else zero_results();
        multiply<kDot, kBottom>({a, a + 16 * stride, stride, 64, b0, b1, 1024}, (to - from) * size / 64);
        store_results(results);
        if (to < k) continue;
        if (kDot == kBf16) finish_f32(p, row, rows, tile, results);
        else finish_int8(p, row, rows, tile, results);
    }
}

/* fp32 rows to bf16, half to even, zero beyond k. */
void round_amx(const float *x, int64_t ldx, int64_t k, int64_t first, int64_t last, int8_t *codes) {
    const int64_t padded = round_up(k, 64), stride = code_stride(2 * padded);
    for (int64_t r = first; r < last; r++) {
        const float *in = x + r * ldx;
        auto *out = reinterpret_cast<uint16_t *>(codes + r * stride);
        for (int64_t i = 0; i < padded; i += 32) {
            const int64_t low = k - i, high = low - 16;
            if (high >= 16) store_bf16(out + i, f_load(in + i), f_load(in + i + 16));
            else
                store_bf16(out + i, low >= 16 ? f_load(in + i) : low > 0 ? f_load_some(in + i, low) : f_zero(),
                           high > 0 ? f_load_some(in + i + 16, high) : f_zero());
        }
    }
}

template <Dot kDot>
void panel_whole(const Panel &p) {
    const int64_t k = padded_k(p.w);
    for (int64_t from = 0; from < k; from += kBlock) {
        const int64_t to = from + kBlock < k ? from + kBlock : k;
        int64_t shape = 0;
        for (int64_t done = 0; done < p.rows; done += 32) {
            const int64_t row = p.first_row + done, rows = p.rows - done < 32 ? p.rows - done : 32;
            if (rows != shape) tile_shapes(rows < 16 ? rows : 16, rows < 16 ? 0 : rows - 16, 16);
            shape = rows;
            const int64_t stride = kDot == kBf16 ? code_stride(2 * k) : code_stride(p.x->k);
            const auto *a = reinterpret_cast<const uint8_t *>(p.x->codes + row * stride + (kDot == kBf16 ? 2 : 1) * from);
            if (rows > 16) row_block<kDot, true>(p, row, rows, from, to, a, stride);
            else row_block<kDot, false>(p, row, rows, from, to, a, stride);
        }
    }
}

/* KQ_INT4: codes of inputs from..to-1 of one tile to signed bytes, less their zeros. out: [(to - from) / 4][64]. */
inline void unpack_int4(const kq_weight *w, int64_t tile, int64_t from, int64_t to, uint8_t *out) {
    const I low = i_set(0x0f0f0f0f);
    I zero = i_set(0x08080808);
    for (int64_t i = from; i < to; i += w->group) {
        if (w->has_zeros) zero = i_spread_bytes(tile_zeros(w, tile) + i / w->group * kTile);
        const uint8_t *in = tile_codes(w, tile) + i * 8;
        for (int64_t v = 0; v < w->group / 8; v++, in += 64, out += 128) {
            const I both = i_load(in);
            i_store(out, i_sub_bytes(both & low, zero));
            i_store(out + 64, i_sub_bytes(i_shift_right(both, 4) & low, zero));
        }
    }
}

/* sums[r] += sx[r, g] * sw[g] * dots[r] for 32 rows and two tiles. */
inline void add_group(const Panel &p, int64_t row, int64_t rows, int64_t tile, int64_t group, const uint8_t *dots,
                      float *sums) {
    for (int64_t side = 0; side < 2; side++) {
        const int64_t t = tile + side < p.last ? tile + side : tile;
        const F scales = f_load_f16(tile_scales_f16(p.w, t) + group * kTile);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = (r / 16 * 2 + side) * kSquare + r % 16 * 16;
            const F scale = scales * f_set(p.x->scales[(row + r) * p.x->groups + group]);
            f_store(sums + at, f_fma(f_from_i(i_load(dots + at * 4)), scale, f_load(sums + at)));
        }
    }
}

template <bool kBottom>
void row_block_int4(const Panel &p, int64_t row, int64_t rows, int64_t from, int64_t to, const uint8_t *unpacked,
                    uint8_t *dots) {
    const int64_t group = p.w->group, stride = code_stride(p.x->k), depth = group < 64 ? group : 64;
    const int64_t end = to < p.w->k ? to : p.w->k;
    for (int64_t tile = p.first; tile < p.last; tile += 2) {
        float *sums = reinterpret_cast<float *>(results_of(p, row, tile));
        if (!from)
            for (int64_t i = 0; i < 4 * kSquare; i += 16) f_store(sums + i, f_zero());
        for (int64_t i = from; i < end; i += group) {
            const uint8_t *a = reinterpret_cast<const uint8_t *>(p.x->codes + row * stride + i);
            const uint8_t *b0 = unpacked + ((tile - p.first) * kBlock + i - from) * kTile;
            const uint8_t *b1 = tile + 1 < p.last ? b0 + kBlock * kTile : b0;
            uint8_t *now = dots + i / group % 2 * 4096, *before = dots + (i / group + 1) % 2 * 4096;
            zero_results();
            multiply<kS8S8, kBottom>({a, a + 16 * stride, stride, depth, b0, b1, depth * kTile}, group / depth);
            store_results(now);
            // One group behind, so that the unit works on while this group's sums are converted.
            if (i > from) add_group(p, row, rows, tile, i / group - 1, before, sums);
        }
        add_group(p, row, rows, tile, end / group - 1, dots + (end / group + 1) % 2 * 4096, sums);
        if (to >= p.w->k) finish_f32(p, row, rows, tile, reinterpret_cast<const uint8_t *>(sums));
    }
}

void panel_int4(const Panel &p) {
    const int64_t k = p.w->k, depth = p.w->group < 64 ? p.w->group / 4 : 16;
    uint8_t *dots = p.scratch, *unpacked = p.scratch + 8192;
    for (int64_t from = 0; from < k; from += kBlock) {
        const int64_t to = from + kBlock < k ? from + kBlock : k;
        for (int64_t tile = p.first; tile < p.last; tile++)
            unpack_int4(p.w, tile, from, to, unpacked + (tile - p.first) * kBlock * kTile);
        int64_t shape = 0;
        for (int64_t done = 0; done < p.rows; done += 32) {
            const int64_t row = p.first_row + done, rows = p.rows - done < 32 ? p.rows - done : 32;
            if (rows != shape) tile_shapes(rows < 16 ? rows : 16, rows < 16 ? 0 : rows - 16, depth);
            shape = rows;
            if (rows > 16) row_block_int4<true>(p, row, rows, from, to, unpacked, dots);
            else row_block_int4<false>(p, row, rows, from, to, unpacked, dots);
        }
    }
}

void linear_amx(const kq_weight *w, const Activations *x, int64_t first, int64_t last, float *y, int64_t ldy,
                int32_t accumulate, void *scratch) {
    if (x->rows < 4 || !x->codes) return linear_tiles(w, x, first, last, y, ldy, accumulate, scratch);
    auto *memory = static_cast<uint8_t *>(scratch);
    constexpr int64_t kResultBytes = kPanelRows * kPanelTiles * kTile * 4;
    for (int64_t tile = first; tile < last; tile += kPanelTiles) {
        const int64_t end = tile + kPanelTiles < last ? tile + kPanelTiles : last;
        for (int64_t row = 0; row < x->rows; row += kPanelRows) {
            const int64_t rows = x->rows - row < kPanelRows ? x->rows - row : kPanelRows;
            const Panel panel = {w,   x,          row,    rows,
                                 tile, end,        y + (tile - first) * kTile, ldy,
                                 accumulate, memory, memory + kResultBytes};
            if (w->kind == KQ_INT4) panel_int4(panel);
            else if (w->kind == KQ_INT8) panel_whole<kS8U8>(panel);
            else panel_whole<kBf16>(panel);
        }
    }
    tile_release();
}

}  // namespace
