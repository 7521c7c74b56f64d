/* Paged attention of a block of queries on the matrix unit: scores and weighted values are products of bf16 tiles summed
 * in fp32. Queries, int8 keys, and softmax weights are rounded to bf16; the softmax itself is fp32.
 *
 *     scores = Q K^T, weights = exp(scores - running largest), sums = sums * shrink + weights V
 * Layouts: Q [queries][D] and weights [queries][kKeys], left operands; K^T [kKeys / 16][D / 2][16][2] and
 * V [D / 16][kKeys / 2][16][2], right ones. Loop order: keys by kKeys, queries by 32, then 2 x 2 tiles of results. */
#pragma once
#include "amx.h"
#include "attention_body.h"
#include "linear_amx.h"

namespace {

constexpr int64_t kTileQueries = 32;

/* The task's matrices in bf16, beside those of Many. */
struct ManyTiles {
    uint16_t *q, *weights, *keys, *values;
    float *panel;  // [D][16], keys on their way
};

/* Positions base..end-1 of K^T; what lies beyond the last 16 of them is left: such scores are never used. */
template <int Kind>
void tile_keys(const kq_cache *cache, const AttendTask *task, int64_t base, int64_t end, const ManyTiles *tiles) {
    const int64_t dim = cache->head_dim;
    for (int64_t at = base; at < end; at += kGroup) {
        widen_keys<Kind>(cache, task, nullptr, nullptr, at, tiles->panel);
        uint16_t *to = tiles->keys + (at - base) * dim;
        for (int64_t d = 0; d < dim; d += 2) {
            store_bf16_pairs(to + d * 16, f_load(tiles->panel + d * 16), f_load(tiles->panel + (d + 1) * 16));
        }
    }
}

/* Positions base..base + kKeys - 1 of V, zero where the task sees none: zero weights must meet numbers. */
template <int Kind>
void tile_values(const kq_cache *cache, const AttendTask *task, int64_t base, uint16_t *values) {
    const int64_t dim = cache->head_dim;
    for (int64_t t = 0; t < kKeys; t += 2) {
        int64_t at[2];
        F scale[2];
        for (int64_t i = 0; i < 2; i++) {
            const int64_t position = base + t + i;
            const bool here = position >= task->begin && position < task->end;
            at[i] = here ? slot_of(cache, task->span, position) * cache->num_kv_heads + task->head : -1;
            scale[i] = f_set(1.0f);
            if (Kind == KQ_CACHE_INT8 && here)
                scale[i] = f_set(float_from_f16(static_cast<const uint16_t *>(cache->value_scales)[at[i]]));
        }
        for (int64_t d = 0; d < dim; d += 16) {
            F v[2];
            for (int64_t i = 0; i < 2; i++) {
                v[i] = at[i] < 0 ? f_zero() : load_16<Kind>(cache->values, at[i] * dim + d);
                if (Kind == KQ_CACHE_INT8) v[i] = v[i] * scale[i];
            }
            store_bf16_pairs(values + d * kKeys + t * 16, v[0], v[1]);
        }
    }
}

/* c [16 R][32] fp32, ldc floats a row, (+)= a [16 R][32 steps] * b: two tiles of columns, b_stride values apart. */
template <int R>
void tile_product(const uint16_t *a, int64_t lda, const uint16_t *b, int64_t b_stride, int64_t steps, float *c,
                  int64_t ldc, bool accumulate) {
    float *low = c + 16 * ldc;
    if (accumulate) {
        TILE_LOAD(0, c, 4 * ldc);
        TILE_LOAD(1, c + 16, 4 * ldc);
        if (R > 1) TILE_LOAD(2, low, 4 * ldc);
        if (R > 1) TILE_LOAD(3, low + 16, 4 * ldc);
    } else {
        zero_results<R>();
    }
    const auto *left = reinterpret_cast<const uint8_t *>(a), *right = reinterpret_cast<const uint8_t *>(b);
    for (int64_t s = 0; s < steps; s++)
        step<kBf16, R>(left + 64 * s, 2 * lda, right + 1024 * s, right + 2 * b_stride + 1024 * s, [](int) {});
    TILE_STORE(0, c, 4 * ldc);
    TILE_STORE(1, c + 16, 4 * ldc);
    if (R > 1) TILE_STORE(2, low, 4 * ldc);
    if (R > 1) TILE_STORE(3, low + 16, 4 * ldc);
}

/* Queries first..last-1 (at most 16 R) against the positions from base on. */
template <int R>
void attend_square(const AttendArgs *args, const AttendTask *task, Many *many, const ManyTiles *tiles, int64_t base,
                   int64_t first, int64_t last) {
    const Range early = seen_from(args, task, base, first), late = seen_from(args, task, base, last - 1);
    const Range computed = {early.lo / 32 * 32, (late.hi + 31) / 32 * 32};
    if (computed.hi <= computed.lo) return;
    const int64_t dim = args->cache->head_dim;
    for (int64_t key = computed.lo; key < computed.hi; key += 32)
        tile_product<R>(tiles->q + first * dim, dim, tiles->keys + key * dim, 16 * dim, dim / 32,
                        many->scores + first * kKeys + key, kKeys, false);
    for (int64_t query = first; query < last; query++) {
        soften_running(many, query, seen_from(args, task, base, query), computed);
        const int64_t row = query * kKeys;
        for (int64_t i = computed.lo; i < computed.hi; i += 32)
            store_bf16(tiles->weights + row + i, f_load(many->scores + row + i), f_load(many->scores + row + i + 16));
    }
    for (int64_t d = 0; d < dim; d += 32)
        tile_product<R>(tiles->weights + first * kKeys + computed.lo, kKeys, tiles->values + d * kKeys + computed.lo * 16,
                        16 * kKeys, (computed.hi - computed.lo) / 32, many->sums + first * dim + d, dim, true);
}

template <int Kind>
void attend_tiles(const AttendArgs *args, const AttendTask *task, char *scratch) {
    const kq_cache *cache = args->cache;
    const int64_t dim = cache->head_dim, queries = queries_of(cache, task), rows = (queries + 15) / 16 * 16;
    Many many{};
    many.queries = queries;
    many.padded = dim;
    many.q = carve(&scratch, queries * dim);
    many.sums = carve(&scratch, rows * dim);
    many.scores = carve(&scratch, rows * kKeys);
    many.largest = carve(&scratch, queries);
    many.total = carve(&scratch, queries);
    const auto carve_bf16 = [&](int64_t count) { return reinterpret_cast<uint16_t *>(carve(&scratch, count / 2)); };
    const ManyTiles tiles = {carve_bf16(rows * dim), carve_bf16(rows * kKeys), carve_bf16(kKeys * dim),
                             carve_bf16(kKeys * dim), carve(&scratch, dim * 16)};
    load_queries(args, task, task->head, many.q, dim);
    for (int64_t i = 0; i < queries * dim; i += 32)
        store_bf16(tiles.q + i, f_load(many.q + i), f_load(many.q + i + 16));
    std::memset(tiles.q + queries * dim, 0, static_cast<size_t>((rows - queries) * dim) * 2);
    std::memset(tiles.weights, 0, static_cast<size_t>(rows * kKeys) * 2);
    std::memset(many.sums, 0, static_cast<size_t>(rows * dim) * sizeof(float));
    for (int64_t i = 0; i < queries; i++) {
        many.largest[i] = kNothing;
        many.total[i] = 0.0f;
    }
    shape_tiles(32, 16);
    for (int64_t base = task->begin / kGroup * kGroup; base < task->end; base += kKeys) {
        tile_keys<Kind>(cache, task, base, base + kKeys < task->end ? base + kKeys : task->end, &tiles);
        tile_values<Kind>(cache, task, base, tiles.values);
        for (int64_t first = 0; first < queries; first += kTileQueries) {
            const int64_t last = first + kTileQueries < queries ? first + kTileQueries : queries;
            if (last - first > 16) attend_square<2>(args, task, &many, &tiles, base, first, last);
            else attend_square<1>(args, task, &many, &tiles, base, first, last);
        }
    }
    tile_release();
    for (int64_t i = 0; i < queries; i++)
        finish_query(args, task, task->head, i, many.sums + i * dim, many.largest[i], many.total[i]);
}

/* fp32 caches are for exactness, short spans wait for memory, and a key with its large bias does not fit bf16 (5 % of the
 * largest output in a test): they stay with the vector kernels. */
void attend_amx(const AttendArgs *args, const AttendTask *task, void *scratch) {
    const kq_cache *cache = args->cache;
    const bool suits = !task->writes && cache->kind != KQ_CACHE_F32 && !cache->key_bias && cache->head_dim % 32 == 0;
    if (!suits) return attend_rows(args, task, scratch);
    if (cache->kind == KQ_CACHE_BF16) attend_tiles<KQ_CACHE_BF16>(args, task, static_cast<char *>(scratch));
    else attend_tiles<KQ_CACHE_INT8>(args, task, static_cast<char *>(scratch));
}

}  // namespace
