/* One token for each row of logits: penalties, temperature, top_k, top_p, min_p, and the inverse of the cumulative
 * weights. Rows are spread over the pool. What it means is in kiloq/ops/draw.py.
 *
 * Nothing is sorted: a cut (the end of the nucleus, the place of the uniform number) is found by parting candidates
 * around a pivot and going on in the part where the cumulative weight, heaviest first, passes the target. */
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "packed.h"
#include "threads.h"

namespace {

constexpr double kColdest = 1e-6;  // below, fp32 cannot tell a temperature from greedy
constexpr double kLightest = std::numeric_limits<float>::min();  // what is forbidden weighs nothing
constexpr int64_t kFew = 1024;     // tokens that a nucleus rarely exceeds
constexpr int64_t kDepth = 64;     // rows of the layout in which the whole distribution is drawn from

struct Candidate {
    float weight;
    int32_t id;
};

/* What a thread works with: parts of its scratch. */
struct Room {
    float *scores, *weights, *peaks, *sums;
    int32_t *places;
    Candidate *some;
};

int64_t lay_out_room(Room *room, int64_t size, char *base) {
    int64_t at = 0;
    const auto place = [&](auto **pointer, int64_t count) {
        *pointer = reinterpret_cast<std::remove_reference_t<decltype(*pointer)>>(base + at);
        at += round_up(count * static_cast<int64_t>(sizeof(**pointer)), 64);
    };
    place(&room->scores, size);
    place(&room->weights, size + kDepth);
    place(&room->peaks, size / kDrawBlock + 2);
    place(&room->sums, size / kDepth + 2);
    place(&room->places, size + 16);
    place(&room->some, size);
    return at;
}

/* The place, heaviest first, at which the cumulative weight passes `target` (reaches it: or_equal), and the weight up to
 * and with it. Candidates before it are in some[0..place]. Ties keep an order that depends on nothing else. */
int64_t cut_at(Candidate *some, int64_t count, double target, bool or_equal, double *mass) {
    int64_t first = 0, last = count;
    double before = 0;  // the weight of some[0..first)
    while (last - first > 1) {
        const float a = some[first].weight, b = some[first + (last - first) / 2].weight, c = some[last - 1].weight;
        const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        Candidate *const heavier_end = std::partition(some + first, some + last, [&](Candidate x) { return x.weight > pivot; });
        Candidate *const equal_end = std::partition(heavier_end, some + last, [&](Candidate x) { return x.weight == pivot; });
        double heavier = before;
        for (Candidate *x = some + first; x < heavier_end; x++) heavier += x->weight;
        const int64_t equals = equal_end - heavier_end;
        const double all = heavier + static_cast<double>(pivot) * static_cast<double>(equals);
        const auto passes = [&](double sum) { return or_equal ? sum >= target : sum > target; };
        if (heavier_end > some + first && passes(heavier)) {
            last = heavier_end - some;
        } else if (passes(all) || equal_end == some + last) {
            first = heavier_end - some;
            for (int64_t i = 1; i <= equals; i++) {
                *mass = heavier + static_cast<double>(pivot) * static_cast<double>(i);
                if (passes(*mass) || i == equals) return first + i - 1;
            }
        } else {
            before = all;
            first = equal_end - some;
        }
    }
    *mass = before + (first < count ? some[first].weight : 0.0f);
    return first;
}

/* A token of candidates of this total: what top_p leaves of them, and there the place of the uniform number. */
int64_t draw_from(Candidate *some, int64_t count, double total, const kq_draw *draw) {
    double mass = 0;
    if (draw->top_p < 1) {
        count = 1 + cut_at(some, count, draw->top_p * total, true, &mass);
    } else {
        for (int64_t i = 0; i < count; i++) mass += some[i].weight;
    }
    double ignored;
    return some[cut_at(some, count, draw->uniform * mass, false, &ignored)].id;
}

/* The top_k largest scores as candidates; how many, as those of -inf are left out. */
int64_t take_largest(const float *x, int64_t size, int64_t top_k, Room *room) {
    const int64_t blocks = (size + kDrawBlock - 1) / kDrawBlock;
    float floor = -std::numeric_limits<float>::max();
    if (top_k < blocks) {  // top_k blocks reach the top_k-th largest of their peaks
        float *peaks = room->sums;
        std::copy(room->peaks, room->peaks + blocks, peaks);
        std::nth_element(peaks, peaks + top_k - 1, peaks + blocks, std::greater<float>());
        floor = std::max(floor, peaks[top_k - 1]);
    }
    int64_t count = 0;
    for (int64_t block = 0; block < blocks; block++) {
        if (room->peaks[block] < floor) continue;
        const int64_t last = std::min(size, (block + 1) * kDrawBlock);
        for (int64_t i = block * kDrawBlock; i < last; i++)
            if (x[i] >= floor) room->some[count++] = {x[i], static_cast<int32_t>(i)};
    }
    if (count > top_k) {
        std::nth_element(room->some, room->some + top_k, room->some + count, [](Candidate a, Candidate b) {
            return a.weight > b.weight || (a.weight == b.weight && a.id > b.id);
        });
        count = top_k;
    }
    return count;
}

int64_t draw_top_k(const float *x, int64_t size, float peak, float inverse, const kq_draw *draw, Room *room) {
    const int64_t count = take_largest(x, size, draw->top_k, room);
    double total = 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
        const float weight = std::exp((room->some[i].weight - peak) * inverse);
        total += weight;
        if (weight >= draw->min_p) room->some[kept++] = {weight, room->some[i].id};
    }
    return draw_from(room->some, kept, total, draw);
}

/* Only a weight of at least (1 - top_p) * total / size can be in the nucleus: all smaller ones together weigh less than
 * (1 - top_p) * total. First as if no more than a few tokens mattered. */
int64_t draw_nucleus(const float *x, int64_t size, float peak, float inverse, const kq_draw *draw, Room *room) {
    const Kernels *kernels = active_kernels();
    const double total = kernels->tempered(x, size, peak, inverse, room->weights);
    int64_t count = 0;
    for (const int64_t spread : {kFew, size}) {
        const double light = 0.999 * (1 - draw->top_p) * total / static_cast<double>(spread);
        const double floor = std::min(std::max({draw->min_p, light, kLightest}), 1.0);
        count = kernels->places_from(room->weights, size, static_cast<float>(floor), room->places);
        double mass = 0;
        for (int64_t i = 0; i < count; i++) {
            room->some[i] = {room->weights[room->places[i]], room->places[i]};
            mass += room->some[i].weight;
        }
        if (draw->min_p >= light || mass >= draw->top_p * total) break;
    }
    return draw_from(room->some, count, total, draw);
}

/* The first place where the cumulative sum passes the target; never one of weight zero, however the sums round. */
int64_t invert(const float *sums, int64_t count, int64_t stride, double target, double *before) {
    double mass = 0;
    int64_t found = 0;
    *before = 0;
    for (int64_t i = 0; i < count; i++) {
        const float weight = sums[i * stride];
        if (weight > 0) found = i, *before = mass;
        mass += weight;
        if (mass > target && weight > 0) break;
    }
    return found;
}

/* From the whole distribution: the column whose sum the number falls into, then the token in it. */
int64_t draw_any(const float *x, int64_t size, float peak, float inverse, const kq_draw *draw, Room *room) {
    const Kernels *kernels = active_kernels();
    const int64_t columns = (size + kDepth - 1) / kDepth;
    kernels->tempered(x, size, peak, inverse, room->weights);
    std::fill(room->weights + size, room->weights + kDepth * columns, 0.0f);
    std::fill(room->sums, room->sums + columns, 0.0f);
    for (int64_t row = 0; row < kDepth; row++) kernels->add_row(room->weights + row * columns, columns, room->sums);
    double mass = 0, before = 0, ignored;
    for (int64_t i = 0; i < columns; i++) mass += room->sums[i];
    const double target = draw->uniform * mass;
    const int64_t column = invert(room->sums, columns, 1, target, &before);
    return invert(room->weights + column, kDepth, columns, target - before, &ignored) * columns + column;
}

int64_t choose(const kq_draw *draw, int64_t size, Room *room) {
    const Kernels *kernels = active_kernels();
    const float *x = draw->logits;
    if (draw->num_shifts || draw->allowed) {
        std::copy(x, x + size, room->scores);
        for (int64_t i = 0; i < draw->num_shifts; i++) {
            float *score = room->scores + draw->shift_ids[i];
            const float divide = static_cast<float>(draw->divide[i]);
            *score = (*score > 0 ? *score / divide : *score * divide) + static_cast<float>(draw->add[i]);
        }
        x = room->scores;
    }
    float peak = kernels->block_peaks(x, size, room->peaks);
    if (!std::isfinite(peak)) return -1;
    if (draw->allowed) {
        for (int64_t i = 0; i < size; i++)
            if (!draw->allowed[i]) room->scores[i] = -std::numeric_limits<float>::infinity();
        peak = kernels->block_peaks(x, size, room->peaks);
        if (!std::isfinite(peak)) return -2;
    }
    if (draw->temperature == 0) {
        const int64_t blocks = (size + kDrawBlock - 1) / kDrawBlock;
        const int64_t block = std::find(room->peaks, room->peaks + blocks, peak) - room->peaks;
        return std::find(x + block * kDrawBlock, x + size, peak) - x;
    }
    const float inverse = static_cast<float>(1 / std::max(draw->temperature, kColdest));
    if (draw->top_k > 0 && draw->top_k < size) return draw_top_k(x, size, peak, inverse, draw, room);
    if (draw->top_k > 0 || draw->top_p < 1 || draw->min_p > 0) return draw_nucleus(x, size, peak, inverse, draw, room);
    return draw_any(x, size, peak, inverse, draw, room);
}

struct Draws {
    const kq_draw *draws;
    int64_t size;
    int64_t *tokens;
};

void draw_piece(void *context, int64_t first, int64_t last, int, void *scratch) {
    const auto *job = static_cast<const Draws *>(context);
    Room room{};
    lay_out_room(&room, job->size, static_cast<char *>(scratch));
    for (int64_t i = first; i < last; i++) job->tokens[i] = choose(&job->draws[i], job->size, &room);
}

bool fits(int64_t size) {
    Room room{};
    return size > 0 && lay_out_room(&room, size, nullptr) <= static_cast<int64_t>(kScratchBytes);
}

}  // namespace

KQ_API int32_t kq_draw_tokens(const kq_draw *draws, int64_t count, int64_t size, int64_t *tokens) {
    if (!fits(size)) return -1;
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < draws[i].num_shifts; j++)
            if (draws[i].shift_ids[j] < 0 || draws[i].shift_ids[j] >= size) return -1;
    Draws job{draws, size, tokens};
    parallel_for(count, 1, draw_piece, &job);
    return 0;
}
