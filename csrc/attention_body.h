/* Rotation, cache writes and paged attention. Compiled once per instruction set.
 *
 * Keys and values lie as [slots, K, D]; 16 positions that start at a multiple of 16 are neighbouring slots.
 * A query that shares its kv head with others is never read from memory twice for the same key: all of a task's
 * queries meet a key while it is in registers or in the nearest cache. */
#pragma once
#include <cstring>

#include "attention.h"
#include "fused_body.h"
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int64_t kMaxDim = 256;
constexpr float kNothing = -3.0e38f;  // a score that no key has: not -inf, whose differences are NaN

/* --- Positions ------------------------------------------------------------------------------------------------- */

/* x[i], x[i + half] turned by one angle per pair, halves paired as in NeoX. */
void turn(float *x, const float *cos, const float *sin, int64_t half) {
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
        const F low = f_load(x + i), high = f_load(x + half + i), c = f_load(cos + i), s = f_load(sin + i);
        f_store(x + i, low * c - high * s);
        f_store(x + half + i, high * c + low * s);
    }
    for (; i < half; i++) {
        const float low = x[i], high = x[half + i];
        x[i] = low * cos[i] - high * sin[i];
        x[half + i] = high * cos[i] + low * sin[i];
    }
}

/* The queries of a task that meet kv head `head`, [rows * heads per key][padded] fp32: normed, turned, times
 * q_scale / sqrt(D); padding is 0. */
void load_queries(const AttendArgs *args, const AttendTask *task, int64_t head, float *q, int64_t padded) {
    const kq_cache *cache = args->cache;
    const kq_places *places = args->places;
    const int64_t shared = heads_per_key(cache), dim = cache->head_dim, half = cache->rotary_dim / 2;
    for (int64_t i = 0; i < queries_of(cache, task); i++, q += padded) {
        const int64_t row = task->span->first_row + task->first + i / shared;
        const float *from = args->qkv + row * qkv_size(cache) + (head * shared + i % shared) * dim;
        for (int64_t d = 0; d < padded; d++) q[d] = d < dim ? from[d] : 0.0f;
        if (args->q_norm) rms_norm_row(q, args->q_norm, args->eps, dim, q);
        turn(q, places->cos + row * half, places->sin + row * half, half);
        const float scale = (places->q_scale ? places->q_scale[row] : 1.0f) / __builtin_sqrtf(static_cast<float>(dim));
        for (int64_t d = 0; d < dim; d++) q[d] *= scale;
    }
}

/* --- The bias of int8 keys -------------------------------------------------------------------------------------- */

float *carve(char **scratch, int64_t floats) {
    auto *start = reinterpret_cast<float *>(*scratch);
    *scratch += (floats * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
    return start;
}

/* Pairs of one kv head whose bias is not zero. */
struct Bias {
    int64_t count;
    int32_t *pair;      // [count]
    float *low, *high;  // [count], the bias of the pair's two channels
};

Bias load_bias(const kq_cache *cache, int64_t head, char **scratch) {
    Bias bias{};
    if (!cache->key_bias) return bias;
    const int64_t half = cache->rotary_dim / 2;
    const float *b = cache->key_bias + head * cache->head_dim;
    bias.pair = reinterpret_cast<int32_t *>(carve(scratch, half));
    bias.low = carve(scratch, half);
    bias.high = carve(scratch, half);
    for (int64_t i = 0; i < half; i++) {
        if (b[i] == 0.0f && b[half + i] == 0.0f) continue;
        bias.pair[bias.count] = static_cast<int32_t>(i);
        bias.low[bias.count] = b[i];
        bias.high[bias.count++] = b[half + i];
    }
    return bias;
}

/* Angles of t = 0..15 tokens, [pairs][kGroup]. The bias at position p is that of angle(p / 16 * 16) turned by angle
 * (p % 16), both from the span's table: angles are rounded products in fp32, so that this is not exactly angle(p).
 * Reader and writer must agree, hence both do so. */
struct Turns { float *cos, *sin; };

Turns load_turns(const kq_cache *cache, const kq_span *span, char **scratch) {
    Turns turns{};
    if (!cache->key_bias) return turns;
    const int64_t half = cache->rotary_dim / 2, padded = (half + 15) / 16 * 16;
    turns.cos = carve(scratch, padded * kGroup);
    turns.sin = carve(scratch, padded * kGroup);
    for (int64_t i = 0; i < half; i += 16) {
        const int64_t some = half - i < 16 ? half - i : 16;
        const auto load = [&](const float *p) { return some == 16 ? f_load(p) : f_load_some(p, some); };
        // YaRN scales its tables; the scale is in the first factor already. Position 0 is angle 0: its cos is the scale.
        const F scale = load(span->cos + i);
        F cos[kGroup], sin[kGroup];
        for (int64_t t = 0; t < kGroup; t++) {
            cos[t] = f_div(load(span->cos + t * half + i), scale);
            sin[t] = f_div(load(span->sin + t * half + i), scale);
        }
        f_store_transposed(turns.cos + i * kGroup, kGroup, cos);
        f_store_transposed(turns.sin + i * kGroup, kGroup, sin);
    }
    return turns;
}

/* x += sign * the bias turned to a position; x: one head of keys, turned. */
void add_bias(const kq_cache *cache, const kq_span *span, int64_t head, const Bias *bias, const Turns *turns,
              int64_t position, float sign, float *x) {
    if (!cache->key_bias) return;
    const int64_t half = cache->rotary_dim / 2, base = position / kGroup * kGroup * half, t = position % kGroup;
    for (int64_t n = 0; n < bias->count; n++) {
        const int64_t i = bias->pair[n];
        const float ct = turns->cos[i * kGroup + t], st = turns->sin[i * kGroup + t];
        const float c = span->cos[base + i] * ct - span->sin[base + i] * st;
        const float s = span->sin[base + i] * ct + span->cos[base + i] * st;
        x[i] += sign * (bias->low[n] * c - bias->high[n] * s);
        x[half + i] += sign * (bias->high[n] * c + bias->low[n] * s);
    }
    const float *b = cache->key_bias + head * cache->head_dim;
    for (int64_t d = cache->rotary_dim; d < cache->head_dim; d++) x[d] += sign * b[d];
}

/* What the bias adds to the scores of query q against 16 positions from `base` on, a multiple of 16:
 * sum_i A_i cos_i(p) + B_i sin_i(p), A = q1 b1 + q2 b2, B = q2 b1 - q1 b2; turned by the base's angle, then by each t. */
F bias_scores(const kq_cache *cache, const kq_span *span, const Bias *bias, const Turns *turns, const float *a,
              const float *b, int64_t base) {
    const int64_t half = cache->rotary_dim / 2;
    const float *cos = span->cos + base * half, *sin = span->sin + base * half;
    F sum = f_zero();
    for (int64_t n = 0; n < bias->count; n++) {
        const int64_t i = bias->pair[n];
        sum = f_fma(f_set(a[n] * cos[i] + b[n] * sin[i]), f_load(turns->cos + i * kGroup), sum);
        sum = f_fma(f_set(b[n] * cos[i] - a[n] * sin[i]), f_load(turns->sin + i * kGroup), sum);
    }
    return sum;
}

/* --- Writing ---------------------------------------------------------------------------------------------------- */

/* 16 numbers, or 8 with zeros above, of a cache of this kind; int8 codes without their scale. */
template <int Kind>
F load_16(const void *p, int64_t at) {
    if constexpr (Kind == KQ_CACHE_BF16) return f_load_bf16(static_cast<const uint16_t *>(p) + at);
    if constexpr (Kind == KQ_CACHE_INT8) return f_load_i8(static_cast<const int8_t *>(p) + at);
    return f_load(static_cast<const float *>(p) + at);
}
template <int Kind>
F load_8(const void *p, int64_t at) {
    if constexpr (Kind == KQ_CACHE_BF16) return f_load_bf16_8(static_cast<const uint16_t *>(p) + at);
    if constexpr (Kind == KQ_CACHE_INT8) return f_load_i8_8(static_cast<const int8_t *>(p) + at);
    return f_load_some(static_cast<const float *>(p) + at, 8);
}
template <int Kind>
constexpr int64_t kItemBytes = Kind == KQ_CACHE_BF16 ? 2 : Kind == KQ_CACHE_INT8 ? 1 : 4;

/* One head of one token, x [padded to 16 with zeros], into place `at` (in heads) of a cache tensor. */
void write_head(const kq_cache *cache, const float *x, void *into, void *scales, int64_t at) {
    const int64_t dim = cache->head_dim;
    if (cache->kind == KQ_CACHE_F32) {
        std::memcpy(static_cast<float *>(into) + at * dim, x, static_cast<size_t>(dim) * sizeof(float));
        return;
    }
    if (cache->kind == KQ_CACHE_BF16) {
        uint16_t rounded[kMaxDim];
        for (int64_t d = 0; d < dim; d += 16) f_store_bf16(rounded + d, f_load(x + d));
        std::memcpy(static_cast<uint16_t *>(into) + at * dim, rounded, static_cast<size_t>(dim) * 2);
        return;
    }
    F largest = f_zero();
    for (int64_t d = 0; d < dim; d += 16) largest = f_max(largest, f_abs(f_load(x + d)));
    const float step = f_largest(largest) / 127.0f;
    const uint16_t scale = f16_from_float(step < 65504.0f ? step : 65504.0f);
    static_cast<uint16_t *>(scales)[at] = scale;
    const float kept = float_from_f16(scale), inverse = kept > 0.0f ? 1.0f / kept : 0.0f;
    int8_t codes[kMaxDim];
    for (int64_t d = 0; d < dim; d += 16) {
        const F clamped = f_max(f_min(f_load(x + d) * f_set(inverse), f_set(127.0f)), f_set(-127.0f));
        i_store_i8(codes + d, i_from_f(clamped));
    }
    std::memcpy(static_cast<int8_t *>(into) + at * dim, codes, static_cast<size_t>(dim));
}

/* Positions first..last-1 of a span, kv heads head..head_end-1: k normed and turned, k (int8: less its turned bias)
 * and v kept. */
void write_rows(const AttendArgs *args, const kq_span *span, int64_t head, int64_t head_end, int64_t first,
                int64_t last, void *scratch) {
    const kq_cache *cache = args->cache;
    const int64_t dim = cache->head_dim, half = cache->rotary_dim / 2;
    char *memory = static_cast<char *>(scratch);
    const Turns turns = load_turns(cache, span, &memory);
    alignas(64) float x[kMaxDim] = {};
    for (; head < head_end; head++) {
        char *rest = memory;
        const Bias bias = load_bias(cache, head, &rest);
        for (int64_t position = first; position < last; position++) {
            const int64_t row = span->first_row + position - span->start;
            const float *k = args->qkv + row * qkv_size(cache) + (cache->num_heads + head) * dim;
            const float *v = k + cache->num_kv_heads * dim;
            const int64_t at = slot_of(cache, span, position) * cache->num_kv_heads + head;
            std::memcpy(x, k, static_cast<size_t>(dim) * sizeof(float));
            if (args->k_norm) rms_norm_row(x, args->k_norm, args->eps, dim, x);
            turn(x, args->places->cos + row * half, args->places->sin + row * half, half);
            add_bias(cache, span, head, &bias, &turns, position, -1.0f, x);
            write_head(cache, x, cache->keys, cache->key_scales, at);
            std::memcpy(x, v, static_cast<size_t>(dim) * sizeof(float));
            write_head(cache, x, cache->values, cache->value_scales, at);
        }
    }
}

/* --- Few queries: keys and values are used as they come from memory ---------------------------------------------- */

#if defined(__AVX512F__)
constexpr int kTogether = 8;  // queries that meet a key while it is in a register
#else
constexpr int kTogether = 4;
#endif

/* A query against int8 keys: 16-bit codes, so that whole numbers are multiplied; their step is absmax / 32767. Sums of
 * 256 products of at most 127 * 32767 fit 32 bits. */
constexpr int64_t kWord = 32;  // 16-bit codes in a vector

/* What a task with few queries has in scratch; heads count from the task's first. */
struct Few {
    int64_t queries, padded;  // of one head; head_dim rounded up to 32
    float *q;                 // [heads][queries][padded]
    int16_t *codes;           // the same, int8 only
    float *steps;             // [heads][queries], int8 only
    float *scales;            // [heads][kGroup] of the cache, int8 only
    float *scores;            // [heads][queries][kPart]
    float *sums;              // [heads][queries][padded]
    float *largest, *total;   // [heads][queries]
    Bias *bias;               // [heads], int8 with a key bias
    Turns turns;
    int64_t pairs;            // rotary_dim / 2
    float *a, *b;             // [heads][queries][pairs]: see bias_scores
    float *constant;          // [heads][queries], what channels that do not turn add
};

void prefetch_head(const char *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch(p + i);
}

/* scores[m][0..15] = q[m] . key(t) of one head, for 16 neighbouring slots; M queries; scores are kPart apart.
 * key: the head's key in the first slot, `step` items from slot to slot; ahead: those that come next, or NULL. */
template <int Kind, int M>
void score_floats(const char *key, const char *ahead, int64_t step, int64_t dim, const float *q, int64_t padded,
                  float *scores) {
    F sums[M][kGroup];
    for (int64_t t = 0; t < kGroup; t++, key += step * kItemBytes<Kind>) {
        if (ahead) prefetch_head(ahead + t * step * kItemBytes<Kind>, dim * kItemBytes<Kind>);
        F acc[M];
        for (int m = 0; m < M; m++) acc[m] = f_zero();
        int64_t d = 0;
        for (; d + 16 <= dim; d += 16) {
            const F k = load_16<Kind>(key, d);
            for (int m = 0; m < M; m++) acc[m] = f_fma(f_load(q + m * padded + d), k, acc[m]);
        }
        if (d < dim) {
            const F k = load_8<Kind>(key, d);
            for (int m = 0; m < M; m++) acc[m] = f_fma(f_load(q + m * padded + d), k, acc[m]);
        }
        for (int m = 0; m < M; m++) sums[m][t] = acc[m];
    }
    for (int m = 0; m < M; m++) f_store(scores + m * kPart, f_sums(sums[m]));
}

/* The same of codes, without any scale. */
template <int M>
void score_codes(const char *key, const char *ahead, int64_t step, int64_t dim, const int16_t *q, int64_t padded,
                 float *scores) {
    F sums[M][kGroup];
    for (int64_t t = 0; t < kGroup; t++, key += step) {
        if (ahead) prefetch_head(ahead + t * step, dim);
        I acc[M];
        for (int m = 0; m < M; m++) acc[m] = i_zero();
        const auto *codes = reinterpret_cast<const int8_t *>(key);
        int64_t d = 0;
        for (; d + kWord <= dim; d += kWord) {
            const I k = i_load_i8_i16(codes + d);
            for (int m = 0; m < M; m++) acc[m] = i_dot_s16(acc[m], i_load(q + m * padded + d), k);
        }
        if (d < dim) {
            const I k = i_load_i8_i16_some(codes + d, dim - d);
            for (int m = 0; m < M; m++) acc[m] = i_dot_s16(acc[m], i_load(q + m * padded + d), k);
        }
        for (int m = 0; m < M; m++) sums[m][t] = f_from_i(acc[m]);
    }
    for (int m = 0; m < M; m++) f_store(scores + m * kPart, f_sums(sums[m]));
}

/* Weights of 16 neighbouring slots times their values onto sums, C vectors of columns from d on; lo..hi-1 of the 16. */
template <int Kind, int M, int C>
void mix_columns(const char *value, const char *ahead, int64_t step, int64_t dim, int64_t lo, int64_t hi, int64_t d,
                 const float *weights, float *sums, int64_t padded) {
    F acc[M][C];
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) acc[m][c] = f_load(sums + m * padded + d + 16 * c);
    for (int64_t t = lo; t < hi; t++) {
        if (ahead && d == 0) prefetch_head(ahead + t * step * kItemBytes<Kind>, dim * kItemBytes<Kind>);
        const char *at = value + (t * step + d) * kItemBytes<Kind>;
        F v[C];
        for (int c = 0; c < C; c++) v[c] = C == 1 && d + 16 > dim ? load_8<Kind>(at, 0) : load_16<Kind>(at, 16 * c);
        for (int m = 0; m < M; m++) {
            const F w = f_set(weights[m * kPart + t]);
            for (int c = 0; c < C; c++) acc[m][c] = f_fma(w, v[c], acc[m][c]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) f_store(sums + m * padded + d + 16 * c, acc[m][c]);
}

/* How many vectors of a value M queries can sum in registers. */
constexpr int columns_for(int queries) {
#if defined(__AVX512F__)
    return queries <= 2 ? 8 : queries <= 5 ? 4 : 2;
#else
    return queries <= 1 ? 4 : queries <= 3 ? 2 : 1;
#endif
}

template <int Kind, int M>
void mix(const char *value, const char *ahead, int64_t step, int64_t dim, int64_t lo, int64_t hi, const float *weights,
         float *sums, int64_t padded) {
    constexpr int C = columns_for(M);
    int64_t d = 0;
    for (; d + 16 * C <= dim; d += 16 * C)
        mix_columns<Kind, M, C>(value, ahead, step, dim, lo, hi, d, weights, sums, padded);
    for (; d < dim; d += 16) mix_columns<Kind, M, 1>(value, ahead, step, dim, lo, hi, d, weights, sums, padded);
}

typedef void (*ScoreFloatsFn)(const char *, const char *, int64_t, int64_t, const float *, int64_t, float *);
typedef void (*ScoreCodesFn)(const char *, const char *, int64_t, int64_t, const int16_t *, int64_t, float *);
typedef void (*MixFn)(const char *, const char *, int64_t, int64_t, int64_t, int64_t, const float *, float *, int64_t);
template <int Kind>
constexpr ScoreFloatsFn kScoreFloats[9] = {
    nullptr, score_floats<Kind, 1>, score_floats<Kind, 2>, score_floats<Kind, 3>, score_floats<Kind, 4>,
    score_floats<Kind, 5>, score_floats<Kind, 6>, score_floats<Kind, 7>, score_floats<Kind, 8>};
constexpr ScoreCodesFn kScoreCodes[9] = {nullptr, score_codes<1>, score_codes<2>, score_codes<3>, score_codes<4>,
                                         score_codes<5>, score_codes<6>, score_codes<7>, score_codes<8>};
template <int Kind>
constexpr MixFn kMix[9] = {nullptr, mix<Kind, 1>, mix<Kind, 2>, mix<Kind, 3>, mix<Kind, 4>,
                           mix<Kind, 5>, mix<Kind, 6>, mix<Kind, 7>, mix<Kind, 8>};

/* How many of `left` queries go together: blocks of about equal size. */
int64_t block_of(int64_t left) {
    const int64_t blocks = (left + kTogether - 1) / kTogether;
    return (left + blocks - 1) / blocks;
}

/* One query to 16-bit codes; returns their step. */
float round_query(const float *q, int64_t padded, int16_t *codes) {
    F largest = f_zero();
    for (int64_t d = 0; d < padded; d += 16) largest = f_max(largest, f_abs(f_load(q + d)));
    const float most = f_largest(largest), inverse = most > 0.0f ? 32767.0f / most : 0.0f;
    for (int64_t d = 0; d < padded; d++) codes[d] = static_cast<int16_t>(__builtin_rintf(q[d] * inverse));
    return most / 32767.0f;
}

template <int Kind>
Few prepare_few(const AttendArgs *args, const AttendTask *task, char *scratch) {
    const kq_cache *cache = args->cache;
    Few few{};
    few.queries = queries_of(cache, task);
    few.padded = (cache->head_dim + kWord - 1) / kWord * kWord;
    const int64_t heads = task->head_end - task->head, rows = heads * few.queries;
    few.q = carve(&scratch, rows * few.padded);
    few.scores = carve(&scratch, rows * kPart);
    few.sums = carve(&scratch, rows * few.padded);
    few.largest = carve(&scratch, rows);
    few.total = carve(&scratch, rows);
    for (int64_t h = 0; h < heads; h++)
        load_queries(args, task, task->head + h, few.q + h * few.queries * few.padded, few.padded);
    std::memset(few.sums, 0, static_cast<size_t>(rows * few.padded) * sizeof(float));
    if (Kind != KQ_CACHE_INT8) return few;
    few.codes = reinterpret_cast<int16_t *>(carve(&scratch, rows * few.padded / 2));
    few.steps = carve(&scratch, rows);
    few.scales = carve(&scratch, (heads + 15) / 16 * 16 * kGroup);
    for (int64_t i = 0; i < rows; i++)
        few.steps[i] = round_query(few.q + i * few.padded, few.padded, few.codes + i * few.padded);
    if (!cache->key_bias) return few;
    const int64_t half = cache->rotary_dim / 2;
    few.bias = reinterpret_cast<Bias *>(carve(&scratch, heads * static_cast<int64_t>(sizeof(Bias) / sizeof(float))));
    few.turns = load_turns(cache, task->span, &scratch);
    few.pairs = half;
    few.a = carve(&scratch, rows * half);
    few.b = carve(&scratch, rows * half);
    few.constant = carve(&scratch, rows);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t head = task->head + i / few.queries;
        Bias *bias = &few.bias[i / few.queries];
        if (i % few.queries == 0) *bias = load_bias(cache, head, &scratch);
        const float *q = few.q + i * few.padded;
        for (int64_t n = 0; n < bias->count; n++) {
            const float low = q[bias->pair[n]], high = q[half + bias->pair[n]];
            few.a[i * half + n] = low * bias->low[n] + high * bias->high[n];
            few.b[i * half + n] = high * bias->low[n] - low * bias->high[n];
        }
        few.constant[i] = 0.0f;
        for (int64_t d = cache->rotary_dim; d < cache->head_dim; d++)
            few.constant[i] += q[d] * cache->key_bias[head * cache->head_dim + d];
    }
    return few;
}

/* Scales of 16 neighbouring slots and the task's heads, [heads][kGroup] fp32. */
void load_scales(const kq_cache *cache, const AttendTask *task, const void *tensor, int64_t slot, float *scales) {
    const auto *first = static_cast<const uint16_t *>(tensor) + slot * cache->num_kv_heads + task->head;
    for (int64_t h = 0; h < task->head_end - task->head; h += 16) {
        const int64_t left = task->head_end - task->head - h;
        F rows[kGroup];
        for (int64_t t = 0; t < kGroup; t++) {
            uint16_t some[16] = {};
            const uint16_t *row = first + t * cache->num_kv_heads + h;
            if (left < 16) std::memcpy(some, row, static_cast<size_t>(left) * sizeof(uint16_t));
            rows[t] = f_load_f16(left < 16 ? some : row);
        }
        f_store_transposed(scales + h * kGroup, kGroup, rows);
    }
}

/* int8: scores of one head and 16 positions from `base` on get their scales and what the bias adds. */
void finish_scores(const kq_cache *cache, const AttendTask *task, const Few *few, int64_t h, int64_t base,
                   const float *scales, float *scores) {
    const F scale = f_load(scales + h * kGroup);
    for (int64_t m = 0; m < few->queries; m++) {
        const int64_t i = h * few->queries + m;
        F score = f_load(scores + m * kPart) * scale * f_set(few->steps[i]);
        if (few->bias) {
            const float *a = few->a + i * few->pairs, *b = few->b + i * few->pairs;
            score = score + f_set(few->constant[i]) +
                    bias_scores(cache, task->span, &few->bias[h], &few->turns, a, b, base);
        }
        f_store(scores + m * kPart, score);
    }
}

/* Which positions of a task row query i sees. */
struct Range { int64_t lo, hi; };
Range seen_by(const AttendArgs *args, const AttendTask *task, int64_t query) {
    const int64_t place = task->span->start + task->first + query / heads_per_key(args->cache);
    const int64_t lo = oldest_seen(place, args->window), hi = place + 1;
    return {lo > task->begin ? lo : task->begin, hi < task->end ? hi : task->end};
}

/* Scores lo..hi-1 become exp(score - largest), others 0. Returns their sum. */
float soften(float *scores, int64_t size, int64_t lo, int64_t hi, float *largest) {
    *largest = kNothing;
    if (hi <= lo) {
        std::memset(scores, 0, static_cast<size_t>(size) * sizeof(float));
        return 0.0f;
    }
    for (int64_t i = 0; i < lo; i++) scores[i] = kNothing;
    for (int64_t i = hi; i < size; i++) scores[i] = kNothing;
    F most = f_set(kNothing);
    for (int64_t i = 0; i < size; i += 16) most = f_max(most, f_load(scores + i));
    *largest = f_largest(most);
    F sum = f_zero();
    for (int64_t i = 0; i < size; i += 16) {
        const F weight = f_exp(f_load(scores + i) - f_set(*largest));
        f_store(scores + i, weight);
        sum = sum + weight;
    }
    return f_sum(sum);
}

/* A query's result: into `partial` as it is, or divided by its sum of weights to out. */
void finish_query(const AttendArgs *args, const AttendTask *task, int64_t head, int64_t query, const float *sums,
                  float largest, float total) {
    const kq_cache *cache = args->cache;
    const int64_t dim = cache->head_dim, shared = heads_per_key(cache);
    float *to;
    float scale = 1.0f;
    if (task->partial) {
        to = task->partial + ((head - task->head) * queries_of(cache, task) + query) * query_floats(cache);
        to[dim] = largest;
        to[dim + 1] = total;
    } else {
        const int64_t row = task->span->first_row + task->first + query / shared;
        to = args->out + (row * cache->num_heads + head * shared + query % shared) * dim;
        scale = 1.0f / total;
    }
    for (int64_t d = 0; d < dim; d++) to[d] = sums[d] * scale;
}

/* Loops: keys by 16 positions, then by head, so that memory is read in its order; then the softmax of each query over
 * the part; then values in the same order. What comes next is fetched ahead. */
template <int Kind>
void attend_few(const AttendArgs *args, const AttendTask *task, char *scratch) {
    const kq_cache *cache = args->cache;
    const int64_t dim = cache->head_dim, num_kv_heads = cache->num_kv_heads, step = num_kv_heads * dim;
    const int64_t heads = task->head_end - task->head, head_bytes = dim * kItemBytes<Kind>;
    const int64_t base = task->begin / kGroup * kGroup, size = (task->end - base + kGroup - 1) / kGroup * kGroup;
    const Few few = prepare_few<Kind>(args, task, scratch);
    const auto start_of = [&](const void *tensor, int64_t at) {
        const int64_t slot = slot_of(cache, task->span, base + at);
        return static_cast<const char *>(tensor) + (slot * num_kv_heads + task->head) * head_bytes;
    };
    for (int64_t at = 0; at < size; at += kGroup) {
        const char *keys = start_of(cache->keys, at);
        const char *ahead = at + kGroup < size ? start_of(cache->keys, at + kGroup) : start_of(cache->values, 0);
        if (Kind == KQ_CACHE_INT8)
            load_scales(cache, task, cache->key_scales, slot_of(cache, task->span, base + at), few.scales);
        for (int64_t h = 0; h < heads; h++) {
            float *scores = few.scores + h * few.queries * kPart + at;
            for (int64_t m = 0, count; m < few.queries; m += count) {
                count = block_of(few.queries - m);
                const char *next = m == 0 ? ahead + h * head_bytes : nullptr;
                const int64_t from = (h * few.queries + m) * few.padded;
                if constexpr (Kind == KQ_CACHE_INT8)
                    kScoreCodes[count](keys + h * head_bytes, next, step, dim, few.codes + from, few.padded,
                                       scores + m * kPart);
                else
                    kScoreFloats<Kind>[count](keys + h * head_bytes, next, step, dim, few.q + from, few.padded,
                                              scores + m * kPart);
            }
            if (Kind != KQ_CACHE_INT8) continue;
            finish_scores(cache, task, &few, h, base + at, few.scales, scores);
        }
    }
    for (int64_t i = 0; i < heads * few.queries; i++) {
        const Range seen = seen_by(args, task, i % few.queries);
        few.total[i] = soften(few.scores + i * kPart, size, seen.lo - base, seen.hi - base, &few.largest[i]);
    }
    for (int64_t at = 0; at < size; at += kGroup) {
        const char *values = start_of(cache->values, at);
        const char *ahead = at + kGroup < size ? start_of(cache->values, at + kGroup) : nullptr;
        if (Kind == KQ_CACHE_INT8)
            load_scales(cache, task, cache->value_scales, slot_of(cache, task->span, base + at), few.scales);
        const int64_t lo = task->begin - base > at ? task->begin - base - at : 0;
        const int64_t hi = task->end - base < at + kGroup ? task->end - base - at : kGroup;
        for (int64_t h = 0; h < heads; h++) {
            float *weights = few.scores + h * few.queries * kPart + at;
            for (int64_t m = 0; Kind == KQ_CACHE_INT8 && m < few.queries; m++)
                f_store(weights + m * kPart, f_load(weights + m * kPart) * f_load(few.scales + h * kGroup));
            for (int64_t m = 0, count; m < few.queries; m += count) {
                count = block_of(few.queries - m);
                const char *next = m == 0 && ahead ? ahead + h * head_bytes : nullptr;
                kMix<Kind>[count](values + h * head_bytes, next, step, dim, lo, hi, weights + m * kPart,
                                  few.sums + (h * few.queries + m) * few.padded, few.padded);
            }
        }
    }
    for (int64_t i = 0; i < heads * few.queries; i++)
        finish_query(args, task, task->head + i / few.queries, i % few.queries, few.sums + i * few.padded,
                     few.largest[i], few.total[i]);
}

/* out = sum_p e^(largest_p - largest) sums_p / sum_p e^(largest_p - largest) total_p, parts in order. */
void merge_parts(const AttendArgs *args, const AttendTask *task, const float *partial, int64_t parts) {
    const kq_cache *cache = args->cache;
    const int64_t dim = cache->head_dim, floats = task_floats(cache, task), queries = queries_of(cache, task);
    AttendTask whole = *task;
    whole.partial = nullptr;
    for (int64_t i = 0; i < floats / query_floats(cache); i++) {
        const float *one = partial + i * query_floats(cache);
        float largest = kNothing, total = 0.0f;
        for (int64_t p = 0; p < parts; p++)
            if (one[p * floats + dim] > largest) largest = one[p * floats + dim];
        alignas(64) float sums[kMaxDim] = {};
        for (int64_t p = 0; p < parts; p++) {
            const float *part = one + p * floats;
            const float weight = __builtin_expf(part[dim] - largest);
            total += weight * part[dim + 1];
            for (int64_t d = 0; d < dim; d++) sums[d] += weight * part[d];
        }
        finish_query(args, &whole, task->head + i / queries, i % queries, sums, largest, total);
    }
}

/* --- Many queries: keys and values are widened once for a block of queries, which then multiplies them as matrices -- */

constexpr int64_t kKeys = 128;  // positions widened at once
constexpr int kRows = 6;        // queries of a register block
#if defined(__AVX512F__)
constexpr int kColumns = 4;     // its vectors of 16 columns
#else
constexpr int kColumns = 1;
#endif

/* A task's matrices, in scratch. Panels are 16 columns wide: K^T [kKeys / 16][padded][16], V [padded / 16][kKeys][16]. */
struct Many {
    int64_t queries, padded;
    float *q, *sums;      // [queries][padded]
    float *scores;        // [queries][kKeys]
    float *keys, *values; // panels
    float *largest, *total;  // [queries]
};

/* c[r][0..16 C) (+)= sum_i a[r][i] * b[i][0..16 C), R rows; b: C panels, `panel` floats apart. */
template <int R, int C>
void block_product(const float *a, int64_t lda, const float *b, int64_t panel, int64_t size, float *c, int64_t ldc,
                   bool accumulate) {
    F acc[R][C];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < C; j++) acc[r][j] = accumulate ? f_load(c + r * ldc + 16 * j) : f_zero();
    for (int64_t i = 0; i < size; i++) {
        F column[C];
        for (int j = 0; j < C; j++) column[j] = f_load(b + j * panel + 16 * i);
        for (int r = 0; r < R; r++) {
            const F x = f_set(a[r * lda + i]);
            for (int j = 0; j < C; j++) acc[r][j] = f_fma(x, column[j], acc[r][j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < C; j++) f_store(c + r * ldc + 16 * j, acc[r][j]);
}

typedef void (*ProductFn)(const float *, int64_t, const float *, int64_t, int64_t, float *, int64_t, bool);
template <int C>
constexpr ProductFn kProducts[kRows + 1] = {nullptr, block_product<1, C>, block_product<2, C>, block_product<3, C>,
                                            block_product<4, C>, block_product<5, C>, block_product<6, C>};

/* The same for any number of panels, `wide` of them: kColumns at a time where so many are left. */
void product(const float *a, int64_t lda, int64_t rows, const float *b, int64_t panel, int64_t size, float *c,
             int64_t ldc, int64_t wide, bool accumulate) {
    int64_t j = 0;
    for (; j + kColumns <= wide; j += kColumns)
        kProducts<kColumns>[rows](a, lda, b + j * panel, panel, size, c + 16 * j, ldc, accumulate);
    for (; j < wide; j++) kProducts<1>[rows](a, lda, b + j * panel, panel, size, c + 16 * j, ldc, accumulate);
}

/* Keys of positions base..base + kGroup - 1 into one panel of K^T, [padded][16]; int8 with scales and bias. */
template <int Kind>
void widen_keys(const kq_cache *cache, const AttendTask *task, const Bias *bias, const Turns *turns, int64_t base,
                float *panel) {
    const int64_t dim = cache->head_dim, slot = slot_of(cache, task->span, base);
    const int64_t at = slot * cache->num_kv_heads + task->head;
    float scales[kGroup];
    if constexpr (Kind == KQ_CACHE_INT8)
        for (int64_t t = 0; t < kGroup; t++)
            scales[t] = float_from_f16(static_cast<const uint16_t *>(cache->key_scales)[at + t * cache->num_kv_heads]);
    for (int64_t d = 0; d < dim; d += 16) {
        F rows[kGroup];
        for (int64_t t = 0; t < kGroup; t++) {
            const int64_t from = (at + t * cache->num_kv_heads) * dim + d;
            rows[t] = d + 16 <= dim ? load_16<Kind>(cache->keys, from) : load_8<Kind>(cache->keys, from);
            if constexpr (Kind == KQ_CACHE_INT8) rows[t] = rows[t] * f_set(scales[t]);
        }
        f_store_transposed(panel + d * 16, 16, rows);
    }
    if (Kind != KQ_CACHE_INT8 || !cache->key_bias) return;
    const int64_t half = cache->rotary_dim / 2;
    for (int64_t n = 0; n < bias->count; n++) {
        const int64_t i = bias->pair[n];
        const F c0 = f_set(task->span->cos[base * half + i]), s0 = f_set(task->span->sin[base * half + i]);
        const F ct = f_load(turns->cos + i * kGroup), st = f_load(turns->sin + i * kGroup);
        const F c = c0 * ct - s0 * st, s = s0 * ct + c0 * st;
        float *low = panel + i * 16, *high = panel + (half + i) * 16;
        f_store(low, f_load(low) + f_set(bias->low[n]) * c - f_set(bias->high[n]) * s);
        f_store(high, f_load(high) + f_set(bias->high[n]) * c + f_set(bias->low[n]) * s);
    }
    for (int64_t d = cache->rotary_dim; d < dim; d++)
        f_store(panel + d * 16, f_load(panel + d * 16) + f_set(cache->key_bias[task->head * dim + d]));
}

/* Values of positions first..last-1 into the rows first - base.. of V's panels. */
template <int Kind>
void widen_values(const kq_cache *cache, const AttendTask *task, int64_t base, int64_t first, int64_t last,
                  float *panels) {
    const int64_t dim = cache->head_dim;
    for (int64_t position = first; position < last; position++) {
        const int64_t at = slot_of(cache, task->span, position) * cache->num_kv_heads + task->head;
        F scale = f_set(1.0f);
        if constexpr (Kind == KQ_CACHE_INT8)
            scale = f_set(float_from_f16(static_cast<const uint16_t *>(cache->value_scales)[at]));
        for (int64_t d = 0; d < dim; d += 16) {
            const F v = d + 16 <= dim ? load_16<Kind>(cache->values, at * dim + d)
                                      : load_8<Kind>(cache->values, at * dim + d);
            f_store(panels + d * kKeys + (position - base) * 16, Kind == KQ_CACHE_INT8 ? v * scale : v);
        }
    }
}

/* Which of the positions base..base + kKeys - 1 query i of the task sees, counted from base. */
Range seen_from(const AttendArgs *args, const AttendTask *task, int64_t base, int64_t query) {
    const Range seen = seen_by(args, task, query);
    const int64_t lo = seen.lo < base ? 0 : seen.lo - base, hi = seen.hi < base ? 0 : seen.hi - base;
    return {lo < kKeys ? lo : kKeys, hi < kKeys ? hi : kKeys};
}

/* Scores become weights: the running largest and total of query i move on, and its sums shrink to the new largest. */
void soften_running(Many *many, int64_t query, Range seen, Range computed) {
    float *scores = many->scores + query * kKeys, largest;
    const int64_t first = computed.lo, size = computed.hi - first;
    if (seen.hi <= seen.lo) {
        std::memset(scores + first, 0, static_cast<size_t>(size) * sizeof(float));
        return;
    }
    for (int64_t i = first; i < seen.lo; i++) scores[i] = kNothing;
    for (int64_t i = seen.hi; i < computed.hi; i++) scores[i] = kNothing;
    F most = f_set(many->largest[query]);
    for (int64_t i = first; i < computed.hi; i += 16) most = f_max(most, f_load(scores + i));
    largest = f_largest(most);
    F sum = f_zero();
    for (int64_t i = first; i < computed.hi; i += 16) {
        const F weight = f_exp(f_load(scores + i) - f_set(largest));
        f_store(scores + i, weight);
        sum = sum + weight;
    }
    if (largest > many->largest[query]) {
        const F shrink = f_exp(f_set(many->largest[query] - largest));
        many->total[query] *= __builtin_expf(many->largest[query] - largest);
        for (int64_t d = 0; d < many->padded; d += 16) {
            float *sums = many->sums + query * many->padded + d;
            f_store(sums, f_load(sums) * shrink);
        }
        many->largest[query] = largest;
    }
    many->total[query] += f_sum(sum);
}

/* Queries first..last-1 (at most kRows) against the widened positions from base on. */
void score_rows(const AttendArgs *args, const AttendTask *task, Many *many, int64_t base, int64_t first, int64_t last) {
    const Range early = seen_from(args, task, base, first), late = seen_from(args, task, base, last - 1);
    const Range computed = {early.lo / 16 * 16, (late.hi + 15) / 16 * 16};
    if (computed.hi <= computed.lo) return;
    const int64_t panel = 16 * many->padded;
    product(many->q + first * many->padded, many->padded, last - first, many->keys + computed.lo / 16 * panel, panel,
            args->cache->head_dim, many->scores + first * kKeys + computed.lo, kKeys,
            (computed.hi - computed.lo) / 16, false);
    for (int64_t query = first; query < last; query++)
        soften_running(many, query, seen_from(args, task, base, query), computed);
    product(many->scores + first * kKeys + early.lo, kKeys, last - first, many->values + 16 * early.lo, 16 * kKeys,
            late.hi - early.lo, many->sums + first * many->padded, many->padded, many->padded / 16, true);
}

/* Loops: keys by kKeys, then queries by kRows, so that a block of keys is in the cache for all queries. */
template <int Kind>
void attend_many(const AttendArgs *args, const AttendTask *task, char *scratch) {
    const kq_cache *cache = args->cache;
    Many many{};
    many.queries = queries_of(cache, task);
    many.padded = (cache->head_dim + 15) / 16 * 16;
    many.q = carve(&scratch, many.queries * many.padded);
    many.sums = carve(&scratch, many.queries * many.padded);
    many.keys = carve(&scratch, kKeys * many.padded);
    many.values = carve(&scratch, kKeys * many.padded);
    many.scores = carve(&scratch, many.queries * kKeys);
    many.largest = carve(&scratch, many.queries);
    many.total = carve(&scratch, many.queries);
    const Bias bias = load_bias(cache, task->head, &scratch);
    const Turns turns = load_turns(cache, task->span, &scratch);
    load_queries(args, task, task->head, many.q, many.padded);
    std::memset(many.sums, 0, static_cast<size_t>(many.queries * many.padded) * sizeof(float));
    for (int64_t i = 0; i < many.queries; i++) {
        many.largest[i] = kNothing;
        many.total[i] = 0.0f;
    }
    for (int64_t base = task->begin / kGroup * kGroup; base < task->end; base += kKeys) {
        const int64_t end = base + kKeys < task->end ? base + kKeys : task->end;
        for (int64_t at = base; at < end; at += kGroup)
            widen_keys<Kind>(cache, task, &bias, &turns, at, many.keys + (at - base) * many.padded);
        widen_values<Kind>(cache, task, base, base > task->begin ? base : task->begin, end, many.values);
        for (int64_t first = 0; first < many.queries; first += kRows)
            score_rows(args, task, &many, base, first, first + kRows < many.queries ? first + kRows : many.queries);
    }
    for (int64_t i = 0; i < many.queries; i++)
        finish_query(args, task, task->head, i, many.sums + i * many.padded, many.largest[i], many.total[i]);
}

/* --- A task ------------------------------------------------------------------------------------------------------ */

template <int Kind>
void attend_kind(const AttendArgs *args, const AttendTask *task, char *scratch) {
    if (task->writes) attend_few<Kind>(args, task, scratch);
    else attend_many<Kind>(args, task, scratch);
}

void attend_rows(const AttendArgs *args, const AttendTask *task, void *scratch) {
    if (task->writes) {
        const int64_t first = task->span->start > task->begin ? task->span->start : task->begin;
        if (first < task->end) write_rows(args, task->span, task->head, task->head_end, first, task->end, scratch);
    }
    switch (args->cache->kind) {
        case KQ_CACHE_BF16: return attend_kind<KQ_CACHE_BF16>(args, task, static_cast<char *>(scratch));
        case KQ_CACHE_INT8: return attend_kind<KQ_CACHE_INT8>(args, task, static_cast<char *>(scratch));
        default: return attend_kind<KQ_CACHE_F32>(args, task, static_cast<char *>(scratch));
    }
}

}  // namespace
