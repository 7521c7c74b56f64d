/* What the driver of attention (attention.cpp) and its kernels (attention_body.h) say to each other. */
#pragma once
#include <cstdint>

#include "kiloq.h"

constexpr int64_t kGroup = 16;      // positions scored at once; blocks of the cache are multiples of it
constexpr int64_t kPart = 256;      // positions of a part: long contexts are cut at multiples of it
constexpr int64_t kFewQueries = 16; // a span with at most so many (rows * heads per key) is cut in parts
constexpr int64_t kMostQueries = 128; // queries of a task of such a span, all its kv heads together, or of one head
constexpr int64_t kLongPart = 1024;   // positions of a part where a span has more queries, but only one block of them
constexpr int64_t kRowBlock = 64;   // queries (rows * heads per key) of a task of a longer span, about

/* The arguments of kq_attention, and what follows from them. */
struct AttendArgs {
    const kq_cache *cache;
    const kq_places *places;
    const float *qkv;
    const float *q_norm, *k_norm;
    float eps;
    int32_t window;
    float *out;
};

/* Rows first..last-1 of a span (counted from its start), the queries that share kv heads head..head_end-1, and the
 * positions begin..end-1 of those that they see. Query i of a head is row first + i / heads_per_key. */
struct AttendTask {
    const kq_span *span;
    int64_t head, head_end, first, last, begin, end;
    bool writes;     // write the span's own positions within begin..end first; else head_end = head + 1
    float *partial;  // where the unfinished result goes (task_floats), or NULL: the whole context is here, to out
};

/* One unfinished query: sum of weighted values [D], the largest score, the sum of weights. */
inline int64_t query_floats(const kq_cache *cache) { return cache->head_dim + 2; }
inline int64_t heads_per_key(const kq_cache *cache) { return cache->num_heads / cache->num_kv_heads; }
/* Queries of a task that meet one kv head. */
inline int64_t queries_of(const kq_cache *cache, const AttendTask *task) {
    return (task->last - task->first) * heads_per_key(cache);
}
/* Unfinished queries lie kv head by kv head. */
inline int64_t task_floats(const kq_cache *cache, const AttendTask *task) {
    return (task->head_end - task->head) * queries_of(cache, task) * query_floats(cache);
}
inline int64_t qkv_size(const kq_cache *cache) {
    return static_cast<int64_t>(cache->num_heads + 2 * cache->num_kv_heads) * cache->head_dim;
}
/* The first position that position `at` sees. */
inline int64_t oldest_seen(int64_t at, int32_t window) { return window > 0 && at >= window ? at - window + 1 : 0; }
/* Of a position within a multiple of kGroup from it, all slots are neighbours. */
inline int64_t slot_of(const kq_cache *cache, const kq_span *span, int64_t position) {
    return static_cast<int64_t>(span->blocks[position / cache->block_size]) * cache->block_size +
           position % cache->block_size;
}
