/* Paged attention of one layer: which thread computes what. The arithmetic is in attention_body.h.
 *
 * Spans of few queries (decoding, speculation) take one phase: a task is one part of the context and some kv heads, all
 * of them where there are parts enough, because heads lie side by side and memory is read fastest in its order. It
 * writes those of the span's own positions that lie in its part, and then reads the part. Parts are cut at fixed
 * positions, so that a row's result depends on no other row, and whoever finishes the last part of some heads merges
 * all, in order. Longer spans (prompts) are written by all threads first, then cut in blocks of rows, or, where there is
 * only one such block, in parts again. */
#include <atomic>
#include <cstdlib>
#include <new>

#include "attention.h"
#include "kernels.h"
#include "threads.h"

namespace {

struct Item {
    AttendTask task;
    int64_t parts;
    float *partials;  // of all parts of these rows and heads
    int64_t counter;  // which of the counters below
};

/* Memory that calls share: it grows and stays. Calls come from one thread at a time. */
struct Workspace {
    Item *items = nullptr;
    float *partials = nullptr;
    std::atomic<int32_t> *counters = nullptr;
    int64_t max_items = 0, max_partials = 0, max_counters = 0;
};
Workspace space;

constexpr int64_t kTasksAThread = 4;  // so many at least, where there is work for them

template <class T>
void reserve(T **memory, int64_t *most, int64_t wanted) {
    if (wanted <= *most) return;
    std::free(*memory);
    const size_t bytes = (static_cast<size_t>(wanted) * sizeof(T) * 5 / 4 + 127) / 64 * 64;
    *memory = static_cast<T *>(std::aligned_alloc(64, bytes));
    if (!*memory) std::abort();
    *most = wanted;
}

int64_t rows_of(const kq_span *span) { return span->stop - span->start; }

bool is_short(const kq_cache *cache, const kq_span *span) {
    return rows_of(span) * heads_per_key(cache) <= kFewQueries || rows_of(span) == 1;
}

int64_t rows_a_block(const kq_cache *cache) {
    const int64_t rows = kRowBlock / heads_per_key(cache);
    return rows < 1 ? 1 : rows;
}

struct Plan {
    const AttendArgs *args;
    int64_t ranges;                     // of kv heads, in which short spans are cut
    int64_t items, partials, counters;  // how many so far
    bool counting;                      // the first pass only counts
};

int64_t parts_of(const AttendArgs *args, const kq_span *span) {
    return (span->stop - 1) / kPart - oldest_seen(span->start, args->window) / kPart + 1;
}

/* As few ranges as give each thread some tasks; results do not depend on it. */
int64_t choose_ranges(const AttendArgs *args) {
    const int64_t heads = args->cache->num_kv_heads;
    int64_t parts = 0;
    for (int64_t i = 0; i < args->places->num_spans; i++)
        if (is_short(args->cache, &args->places->spans[i])) parts += parts_of(args, &args->places->spans[i]);
    if (parts == 0) return 1;
    const int64_t wanted = num_threads() == 1 ? 1 : (kTasksAThread * num_threads() + parts - 1) / parts;
    return wanted < heads ? wanted : heads;
}

void add(Plan *plan, const Item &item) {
    if (!plan->counting) space.items[plan->items] = item;
    plan->items++;
}

/* Rows first..last-1 of a span against its context, cut at multiples of `size`. */
void add_parts(Plan *plan, AttendTask task, int64_t size) {
    const AttendArgs *args = plan->args;
    const int64_t begin = oldest_seen(task.span->start + task.first, args->window), end = task.span->start + task.last;
    const int64_t floats = task_floats(args->cache, &task);
    Item item = {task, (end - 1) / size - begin / size + 1, space.partials + plan->partials, plan->counters};
    for (int64_t part = 0; part < item.parts; part++) {
        const int64_t cut = (begin / size + part) * size;
        item.task.begin = begin > cut ? begin : cut;
        item.task.end = end < cut + size ? end : cut + size;
        item.task.partial = item.parts > 1 ? item.partials + part * floats : nullptr;
        add(plan, item);
    }
    if (item.parts == 1) return;
    plan->partials += item.parts * floats;
    plan->counters++;
}

void plan_short(Plan *plan, const kq_span *span) {
    const kq_cache *cache = plan->args->cache;
    AttendTask task = {span, 0, 0, 0, rows_of(span), 0, 0, true, nullptr};
    const int64_t most = kMostQueries / queries_of(cache, &task), wanted = (cache->num_kv_heads + plan->ranges - 1) / plan->ranges;
    const int64_t heads = wanted <= most ? wanted : most > 1 ? most : 1;
    for (; task.head < cache->num_kv_heads; task.head += heads) {
        task.head_end = task.head + heads < cache->num_kv_heads ? task.head + heads : cache->num_kv_heads;
        add_parts(plan, task, kPart);
    }
}

/* Later rows see more: they come first, so that no large piece is left for the end. */
void plan_long(Plan *plan, const kq_span *span) {
    const kq_cache *cache = plan->args->cache;
    const int64_t step = rows_a_block(cache), rows = rows_of(span);
    const int64_t size = rows <= step ? kLongPart : span->stop;  // a span of several blocks has tasks enough
    for (int64_t first = (rows - 1) / step * step; first >= 0; first -= step) {
        const int64_t last = first + step < rows ? first + step : rows;
        for (int64_t head = 0; head < cache->num_kv_heads; head++)
            add_parts(plan, {span, head, head + 1, first, last, 0, 0, false, nullptr}, size);
    }
}

void make_plan(Plan *plan) {
    const kq_places *places = plan->args->places;
    plan->items = plan->partials = plan->counters = 0;
    for (int64_t i = 0; i < places->num_spans; i++)
        if (!is_short(plan->args->cache, &places->spans[i])) plan_long(plan, &places->spans[i]);
    for (int64_t i = 0; i < places->num_spans; i++)
        if (is_short(plan->args->cache, &places->spans[i])) plan_short(plan, &places->spans[i]);
}

void run_items(void *context, int64_t first, int64_t last, int, void *scratch) {
    const auto *args = static_cast<const AttendArgs *>(context);
    const Kernels *kernels = active_kernels();
    for (int64_t i = first; i < last; i++) {
        const Item *item = &space.items[i];
        kernels->attend(args, &item->task, scratch);
        if (item->parts == 1) continue;
        if (space.counters[item->counter].fetch_add(1, std::memory_order_acq_rel) == item->parts - 1)
            kernels->merge(args, &item->task, item->partials, item->parts);
    }
}

struct Writes {
    const AttendArgs *args;
    const kq_span *span;
};

void run_writes(void *context, int64_t first, int64_t last, int, void *scratch) {
    const auto *writes = static_cast<const Writes *>(context);
    const int64_t start = writes->span->start;
    active_kernels()->write(writes->args, writes->span, 0, writes->args->cache->num_kv_heads, start + first,
                            start + last, scratch);
}

}  // namespace

KQ_API void kq_attention(const kq_cache *cache, const kq_places *places, const float *qkv, const float *q_norm,
                         const float *k_norm, float eps, int32_t window, float *out) {
    AttendArgs args = {cache, places, qkv, q_norm, k_norm, eps, window, out};
    begin_region();  // nobody else's call uses the workspace meanwhile
    Plan plan = {&args, choose_ranges(&args), 0, 0, 0, true};
    make_plan(&plan);
    reserve(&space.items, &space.max_items, plan.items);
    reserve(&space.partials, &space.max_partials, plan.partials);
    reserve(&space.counters, &space.max_counters, plan.counters);
    for (int64_t i = 0; i < plan.counters; i++) new (&space.counters[i]) std::atomic<int32_t>(0);
    plan.counting = false;
    make_plan(&plan);
    for (int64_t i = 0; i < places->num_spans; i++) {
        if (is_short(cache, &places->spans[i])) continue;
        Writes writes = {&args, &places->spans[i]};
        parallel_for(rows_of(&places->spans[i]), 16, run_writes, &writes);
    }
    parallel_for(plan.items, 1, run_items, &args);
    end_region();
}
