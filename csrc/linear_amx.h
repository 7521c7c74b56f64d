/* Matrix products over packed tiles with the matrix unit, for some rows of activations or more.
 *
 * A packed tile is already what the unit wants: 64 bytes are four (int) or two (bf16) inputs of 16 outputs, and 16 such
 * vectors are one right operand. Formula, for each group g of inputs (one for KQ_INT8):
 *     y[m, n] = sum over g of (sx[m, g] * sw[n, g]) * dot(x[m, g], w[n, g] - zero[n, g])
 * with exact dot products, in the order of linear_body.h: the same bits. Loop order, outside in: two tiles of outputs,
 * 48 rows, inputs. Six results of 16 x 16 stay in registers over all inputs of a group; both operands come from the
 * second cache, which five tiles for six products just do not overload. */
#pragma once
#include "amx.h"
#include "kernels.h"
#include "linear_body.h"
#include "packed.h"

namespace {

constexpr int64_t kSquare = 16 * 16;      // values of a result tile
constexpr int64_t kSquareBytes = kSquare * 4;
constexpr int64_t kMaxResults = 6;
constexpr int64_t kTileRows = 8;          // rows from which tiles pay; KQ_INT4: 9
constexpr int64_t kNear = 4096;           // bytes from a vector that is read to the one that is fetched

enum Dot { kS8U8, kS8S8, kBf16 };

/* Tile registers: result of row tile r and output tile s in 2 r + s; right operands in 7; left ones in 6, and in 5 for
 * the second of two row tiles, which may be short. */
inline void shape_tiles(int64_t rows, int64_t depth) {
    TileConfig config = {};
    config.palette = 1;
    const int64_t top = rows < 16 ? rows : 16, bottom = rows < 32 ? rows - top : 16;
    for (int t = 0; t < 8; t++) {
        const bool low = t == 2 || t == 3 || t == 5;
        const int64_t used = t == 7 ? depth : low && rows <= 32 ? bottom : top;
        config.bytes[t] = static_cast<uint16_t>(t == 6 || (t == 5 && rows <= 32) ? 4 * depth : 64);
        config.rows[t] = static_cast<uint8_t>(used ? used : 1);
    }
    tile_config(&config);
}

template <int R>
inline void zero_results() {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (R > 1) TILE_ZERO(2);
    if (R > 1) TILE_ZERO(3);
    if (R > 2) TILE_ZERO(4);
    if (R > 2) TILE_ZERO(5);
}

/* out: int32 or fp32 [2 R][16][16]. */
template <int R>
inline void store_results(uint8_t *out) {
    TILE_STORE(0, out, 64);
    TILE_STORE(1, out + kSquareBytes, 64);
    if (R > 1) TILE_STORE(2, out + 2 * kSquareBytes, 64);
    if (R > 1) TILE_STORE(3, out + 3 * kSquareBytes, 64);
    if (R > 2) TILE_STORE(4, out + 4 * kSquareBytes, 64);
    if (R > 2) TILE_STORE(5, out + 5 * kSquareBytes, 64);
}

#define DOT(c, a)                                       \
    do {                                                \
        if (kDot == kS8U8) TILE_DOT_S8U8(c, a, 7);      \
        else if (kDot == kS8S8) TILE_DOT_S8S8(c, a, 7); \
        else TILE_DOT_BF16(c, a, 7);                    \
    } while (0)

/* R row tiles (16 rows `stride` apart each) times two output tiles, 64 bytes of inputs deep at most. between(i) runs
 * after product i of 2 R: vector work that the unit's time hides. */
template <Dot kDot, int R, typename Between>
inline void step(const uint8_t *a, int64_t stride, const uint8_t *b0, const uint8_t *b1, Between between) {
    TILE_LOAD(7, b0, 64);
    TILE_LOAD(6, a, stride);
    DOT(0, 6);
    between(0);
    if (R == 1) {
        TILE_LOAD(7, b1, 64);
        DOT(1, 6);
        between(1);
    } else if (R == 2) {
        TILE_LOAD(5, a + 16 * stride, stride);
        DOT(2, 5);
        between(1);
        TILE_LOAD(7, b1, 64);
        DOT(1, 6);
        between(2);
        DOT(3, 5);
        between(3);
    } else {
        TILE_LOAD(6, a + 16 * stride, stride);
        DOT(2, 6);
        between(1);
        TILE_LOAD(6, a + 32 * stride, stride);
        DOT(4, 6);
        between(2);
        TILE_LOAD(7, b1, 64);
        DOT(5, 6);
        between(3);
        TILE_LOAD(6, a, stride);
        DOT(1, 6);
        between(4);
        TILE_LOAD(6, a + 16 * stride, stride);
        DOT(3, 6);
        between(5);
    }
}
#undef DOT

/* Two output tiles against all rows: where they lie, and which lines of memory to call for meanwhile. */
struct Pair {
    const kq_weight *w;
    const Activations *x;
    int64_t tile, tiles;         // the first, and 1 or 2 of them
    float *y;                    // row 0 of x, first column of the first tile
    int64_t ldy;
    int32_t accumulate;
    const uint8_t *b;            // the first tile's bytes in memory
    int64_t b_stride;            // bytes to the second tile's, 0 where there is none
    const uint8_t *ahead;        // the next pair in memory, or NULL
    int64_t blocks;              // of 48 rows or fewer, that share the fetching of `ahead`
    uint8_t *results;            // [3][kMaxResults] squares
    uint8_t *unpacked;           // KQ_INT4: [groups, or 2 in turn][2 tiles][group / 4][64]
};

/* y[row + r] = value + bias, or += for accumulate, of output tile `side`. */
inline void put(const Pair &p, int64_t row, int64_t side, F value) {
    const int64_t column = (p.tile + side) * kTile, left = p.w->n - column;
    float *y = p.y + row * p.ldy + side * kTile;
    if (left >= kTile) {
        if (p.w->bias) value = value + f_load(p.w->bias + column);
        f_store(y, p.accumulate ? f_load(y) + value : value);
        return;
    }
    if (p.w->bias) value = value + f_load_some(p.w->bias + column, left);
    f_store_some(y, p.accumulate ? f_load_some(y, left) + value : value, left);
}

inline const uint8_t *result_row(const uint8_t *results, int64_t r, int64_t side) {
    return results + (r / 16 * 2 + side) * kSquareBytes + r % 16 * 64;
}

inline void finish_int8(const Pair &p, int64_t row, int64_t rows) {
    for (int64_t side = 0; side < p.tiles; side++) {
        const F scales = f_load(tile_scales_f32(p.w, p.tile + side));
        for (int64_t r = 0; r < rows; r++) {
            const I exact = i_load(result_row(p.results, r, side)) - i_set(128 * p.x->sums[row + r]);
            put(p, row + r, side, f_from_i(exact) * (scales * f_set(p.x->scales[row + r])));
        }
    }
}

inline void finish_f32(const Pair &p, const uint8_t *results, int64_t row, int64_t rows) {
    for (int64_t side = 0; side < p.tiles; side++) {
        for (int64_t r = 0; r < rows; r++) {
            put(p, row + r, side, f_load(reinterpret_cast<const float *>(result_row(results, r, side))));
        }
    }
}

/* Lines to call for in each step: a share of the next pair, or what this pair's only sweep reads soon. */
struct Ahead {
    const uint8_t *first, *second;  // in the first tile and in the second
    int64_t lines;                  // of each a step
};

/* `bytes`: of one tile in memory a step. */
inline Ahead look_ahead(const Pair &p, const uint8_t *memory, int64_t block, int64_t steps, int64_t bytes) {
    const int64_t apart = tile_bytes(p.w), lines = bytes / 64;
    if (p.blocks == 1) return {memory + kNear, memory + apart + kNear, lines};
    if (!p.ahead) return {memory, memory, 0};
    const int64_t share = (lines + p.blocks - 1) / p.blocks, from = block * steps * share * 64;
    if (from >= apart) return {memory, memory, 0};
    return {p.ahead + from, p.ahead + apart + from, share};
}
inline void call_for(Ahead *ahead) {
    for (int64_t i = 0; i < ahead->lines; i++) {
        fetch_second(ahead->first + 64 * i);
        fetch_second(ahead->second + 64 * i);
    }
    ahead->first += 64 * ahead->lines;
    ahead->second += 64 * ahead->lines;
}

/* KQ_INT8 and KQ_BF16: rows row..row+rows-1. */
template <Dot kDot, int R>
void whole_block(const Pair &p, int64_t row, int64_t rows, int64_t block) {
    const int64_t size = kDot == kBf16 ? 2 : 1, steps = padded_k(p.w) * size / 64;
    const int64_t stride = kDot == kBf16 ? code_stride(2 * padded_k(p.w)) : code_stride(p.x->k);
    const auto *a = reinterpret_cast<const uint8_t *>(p.x->codes + row * stride);
    Ahead ahead = look_ahead(p, p.b, block, steps, 1024);
    const uint8_t *b0 = p.b, *b1 = p.b + p.b_stride;
    zero_results<R>();
    for (int64_t s = 0; s < steps; s++) {
        call_for(&ahead);
        step<kDot, R>(a + 64 * s, stride, b0 + 1024 * s, b1 + 1024 * s, [](int) {});
    }
    store_results<R>(p.results);
    if (kDot == kBf16) finish_f32(p, p.results, row, rows);
    else finish_int8(p, row, rows);
}

/* KQ_INT4: a group of both tiles to signed bytes less their zeros. out: [tiles][group / 4][64]. */
inline void unpack_group(const Pair &p, int64_t group, uint8_t *out) {
    const kq_weight *w = p.w;
    const I low = i_set(0x0f0f0f0f);
    for (int64_t t = p.tile; t < p.tile + p.tiles; t++) {
        const I zero = w->has_zeros ? i_spread_bytes(tile_zeros(w, t) + group * kTile) : i_set(0x08080808);
        const uint8_t *in = tile_codes(w, t) + group * w->group * 8;
        for (int64_t v = 0; v < w->group / 8; v++, in += 64, out += 128) {
            __builtin_prefetch(in + kNear);
            const I both = i_load(in);
            i_store(out, i_sub_bytes(both & low, zero));
            i_store(out + 64, i_sub_bytes(i_shift_right(both, 4) & low, zero));
        }
    }
}

/* Rows from..to-1 of square q: sums += (sx * sw) * dots. sx: the scale of the square's row 0; scales a row: `ld`. */
inline void fold(const uint8_t *dots, uint8_t *sums, int64_t q, int64_t from, int64_t to, const float *sx, int64_t ld,
                 F scales) {
    for (int64_t r = from; r < to; r++) {
        auto *sum = reinterpret_cast<float *>(sums + q * kSquareBytes + r * 64);
        const F dot = f_from_i(i_load(dots + q * kSquareBytes + r * 64));
        f_store(sum, f_fma(dot, scales * f_set(sx[r * ld]), f_load(sum)));
    }
}

/* KQ_INT4, groups of kSteps steps of `depth` inputs. The sums of a group are folded into the fp32 ones while the unit
 * multiplies the next. */
template <int R, int kSteps>
void group_block(const Pair &p, int64_t row, int64_t rows, int64_t block) {
    const int64_t group = p.w->group, depth = group / kSteps, stride = code_stride(p.x->k), groups = p.x->groups;
    const auto *a = reinterpret_cast<const uint8_t *>(p.x->codes + row * stride);
    uint8_t *sums = p.results + 2 * kMaxResults * kSquareBytes;
    const uint16_t *sw0 = tile_scales_f16(p.w, p.tile), *sw1 = tile_scales_f16(p.w, p.tile + p.tiles - 1);
    Ahead ahead = look_ahead(p, p.b, block, groups * kSteps, depth * kTile / 2);
    if (p.blocks == 1) ahead.lines = 0;  // unpacking calls for them
    for (int64_t i = 0; i < 2 * R * kSquareBytes; i += 64) i_store(sums + i, i_zero());
    if (p.blocks == 1) unpack_group(p, 0, p.unpacked);
    for (int64_t g = 0; g <= groups; g++) {
        uint8_t *now = p.results + g % 2 * kMaxResults * kSquareBytes;
        const uint8_t *before = p.results + (g + 1) % 2 * kMaxResults * kSquareBytes;
        const float *sx = p.x->scales + row * groups + g - 1;
        const F scales[2] = {f_load_f16(sw0 + (g ? g - 1 : 0) * kTile), f_load_f16(sw1 + (g ? g - 1 : 0) * kTile)};
        const auto fold_part = [&](int64_t part, int i) {
            const int64_t r = i / 2 * 16, in = R == 3 || rows - r > 16 ? 16 : rows - r;
            const int64_t from = part * 16 / kSteps, to = (part + 1) * 16 / kSteps;
            if (R == 3) fold(before, sums, i, from, to, sx + r * groups, groups, scales[i % 2]);
            else fold(before, sums, i, from, to < in ? to : in, sx + r * groups, groups, scales[i % 2]);
        };
        if (g == groups) {
            for (int64_t s = 0; s < kSteps; s++)
                for (int i = 0; i < 2 * R; i++) fold_part(s, i);
            break;
        }
        // One sweep: the next group is unpacked beside this one's products, and never leaves the first cache.
        if (p.blocks == 1 && g + 1 < groups) unpack_group(p, g + 1, p.unpacked + (g + 1) % 2 * 2 * group * kTile);
        const uint8_t *b0 = p.unpacked + (p.blocks == 1 ? g % 2 : g) * 2 * group * kTile;
        zero_results<R>();
        for (int64_t s = 0; s < kSteps; s++) {
            call_for(&ahead);
            step<kS8S8, R>(a + g * group + s * depth, stride, b0 + s * depth * kTile, b0 + (p.tiles - 1) * group * kTile + s * depth * kTile,
                           [&](int i) {
                               if (g) fold_part(s, i);
                           });
        }
        store_results<R>(now);
    }
    finish_f32(p, sums, row, rows);
}

template <int R>
void any_block(const Pair &p, int64_t row, int64_t rows, int64_t block) {
    if (p.w->kind == KQ_INT8) whole_block<kS8U8, R>(p, row, rows, block);
    else if (p.w->kind == KQ_BF16) whole_block<kBf16, R>(p, row, rows, block);
    else if (p.w->group == 128) group_block<R, 2>(p, row, rows, block);
    else group_block<R, 1>(p, row, rows, block);
}

/* How many of `left` rows the next block takes: 48 while there are, then 32 or fewer, as only the second of two row
 * tiles may be short. */
inline int64_t block_rows(int64_t left) { return left >= 48 ? 48 : left > 32 ? 32 : left; }

void multiply_pair(const Pair &p, int64_t *shaped) {
    const int64_t depth = p.w->kind == KQ_INT4 && p.w->group == 32 ? 8 : 16;
    for (int64_t row = 0, block = 0; row < p.x->rows; block++) {
        const int64_t rows = block_rows(p.x->rows - row);
        if (rows != *shaped) shape_tiles(rows, depth);
        *shaped = rows;
        if (rows == 48) any_block<3>(p, row, rows, block);
        else if (rows > 16) any_block<2>(p, row, rows, block);
        else any_block<1>(p, row, rows, block);
        row += rows;
    }
}

void linear_amx(const kq_weight *w, const Activations *x, int64_t first, int64_t last, float *y, int64_t ldy,
                int32_t accumulate, void *scratch) {
    const bool fits = w->kind != KQ_INT4 || 2 * kTile * w->k + 3 * kMaxResults * kSquareBytes <= int64_t{kLinearScratch};
    // KQ_BF16 goes by what the whole product's rows were rounded to: a piece of few rows must not differ from the others.
    const bool pays = w->kind == KQ_BF16 ? x->codes != nullptr : x->rows >= (w->kind == KQ_INT4 ? 9 : kTileRows);
    if (!pays || !fits) return linear_tiles(w, x, first, last, y, ldy, accumulate, scratch);
    auto *results = static_cast<uint8_t *>(scratch), *unpacked = results + 3 * kMaxResults * kSquareBytes;
    const int64_t blocks = x->rows / 48 + (x->rows % 48 != 0) + (x->rows % 48 > 32);
    int64_t shaped = 0;
    for (int64_t tile = first; tile < last; tile += 2) {
        const int64_t tiles = last - tile < 2 ? 1 : 2;
        Pair pair = {w, x, tile, tiles, y + (tile - first) * kTile, ldy, accumulate, tile_codes(w, tile),
                     tiles < 2 ? 0 : tile_bytes(w), tile + 2 < last ? tile_codes(w, tile + 2) : nullptr, blocks, results, unpacked};
        if (w->kind == KQ_INT4 && blocks > 1) {
            for (int64_t g = 0; g < x->groups; g++) unpack_group(pair, g, unpacked + g * 2 * w->group * kTile);
        }
        multiply_pair(pair, &shaped);
    }
    tile_release();
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

}  // namespace
