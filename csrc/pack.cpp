/* Canonical codes to the layouts of packed.h and back. A thread takes whole tiles: 16 rows are read side by side and
 * written as one stream, four bytes a row at a time. */
#include <cstring>

#include "packed.h"
#include "threads.h"

namespace {

constexpr int64_t kMaxInputs = 131072;        // 127 * 127 * inputs fits 32 bits
constexpr int64_t kMaxOutputs = int64_t{1} << 31;

struct Pack {
    const kq_weight *w;
    uint8_t *codes;        // canonical
    float *scales;
    uint8_t *zeros;
    int64_t row_bytes;     // of canonical codes
};

int64_t element_bytes(const kq_weight *w) { return w->kind == KQ_BF16 ? 2 : 1; }
/* Canonical bytes that make four packed ones. */
int64_t step_bytes(const kq_weight *w) { return w->kind == KQ_INT4 ? 8 : 4; }

uint32_t pack_step(int32_t kind, const uint8_t *from) {
    uint32_t low, high;
    std::memcpy(&low, from, 4);
    if (kind == KQ_BF16) return low;
    if (kind == KQ_INT8) return low ^ 0x80808080u;
    std::memcpy(&high, from + 4, 4);
    return (low & 0x0f0f0f0fu) | (high & 0x0f0f0f0fu) << 4;
}

void unpack_step(int32_t kind, uint32_t packed, uint8_t *into) {
    if (kind == KQ_INT8) packed ^= 0x80808080u;
    const uint32_t low = kind == KQ_INT4 ? packed & 0x0f0f0f0fu : packed;
    const uint32_t high = packed >> 4 & 0x0f0f0f0fu;
    std::memcpy(into, &low, 4);
    if (kind == KQ_INT4) std::memcpy(into + 4, &high, 4);
}

/* Some steps of a row, then of the next: rows are often a power of two apart, and sixteen lines that far apart do not
 * stay in the first cache together. */
template <int Kind>
void pack_codes(const Pack *p, int64_t tile) {
    constexpr int64_t kSteps = 16;
    const int64_t step = step_bytes(p->w), total = padded_k(p->w) * element_bytes(p->w) / step;
    const int64_t whole = p->row_bytes / step, rows = p->w->n - tile * kTile < kTile ? p->w->n - tile * kTile : kTile;
    uint8_t *out = const_cast<uint8_t *>(tile_codes(p->w, tile));
    const uint8_t *in = p->codes + tile * kTile * p->row_bytes;
    for (int64_t first = 0; first < total; first += kSteps) {
        const int64_t last = first + kSteps < total ? first + kSteps : total;
        for (int64_t r = 0; r < kTile; r++) {
            const uint8_t *row = in + r * p->row_bytes;
            const int64_t full = r >= rows ? first : whole < first ? first : whole < last ? whole : last;
            for (int64_t v = first; v < full; v++) {
                const uint32_t four = pack_step(Kind, row + v * step);
                std::memcpy(out + (v * kTile + r) * 4, &four, 4);
            }
            for (int64_t v = full; v < last; v++) {
                uint8_t part[8] = {};
                if (r < rows && v * step < p->row_bytes) std::memcpy(part, row + v * step, p->row_bytes - v * step);
                const uint32_t four = pack_step(Kind, part);
                std::memcpy(out + (v * kTile + r) * 4, &four, 4);
            }
        }
    }
}

void unpack_codes(const Pack *p, int64_t tile) {
    const int64_t step = step_bytes(p->w);
    const uint8_t *in = tile_codes(p->w, tile);
    for (int64_t r = 0; r < kTile && tile * kTile + r < p->w->n; r++) {
        uint8_t *out = p->codes + (tile * kTile + r) * p->row_bytes;
        for (int64_t at = 0, v = 0; at < p->row_bytes; at += step, v++) {
            uint8_t part[8];
            uint32_t four;
            std::memcpy(&four, in + (v * kTile + r) * 4, 4);
            unpack_step(p->w->kind, four, part);
            std::memcpy(out + at, part, p->row_bytes - at < step ? p->row_bytes - at : step);
        }
    }
}

void pack_scales(const Pack *p, int64_t tile) {
    const kq_weight *w = p->w;
    const int64_t groups = num_groups(w), real = w->group ? w->k / w->group : 1;
    auto *f32 = const_cast<float *>(tile_scales_f32(w, tile));
    auto *f16 = const_cast<uint16_t *>(tile_scales_f16(w, tile));
    auto *zeros = const_cast<uint8_t *>(tile_zeros(w, tile));
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t r = 0; r < kTile; r++) {
            const int64_t row = tile * kTile + r, from = row * real + g;
            const bool there = row < w->n && g < real;
            if (w->kind == KQ_INT8) f32[r] = there ? p->scales[from] : 0.0f;
            else f16[g * kTile + r] = there ? to_f16(p->scales[from]) : 0;
            if (w->has_zeros) zeros[g * kTile + r] = there ? p->zeros[from] : 0;
        }
    }
}

void unpack_scales(const Pack *p, int64_t tile) {
    const kq_weight *w = p->w;
    const int64_t real = w->group ? w->k / w->group : 1;
    for (int64_t r = 0; r < kTile && tile * kTile + r < w->n; r++) {
        for (int64_t g = 0; g < real; g++) {
            const int64_t to = (tile * kTile + r) * real + g;
            p->scales[to] = w->kind == KQ_INT8 ? tile_scales_f32(w, tile)[r]
                                               : from_f16(tile_scales_f16(w, tile)[g * kTile + r]);
            if (w->has_zeros && p->zeros) p->zeros[to] = tile_zeros(w, tile)[g * kTile + r];
        }
    }
}

void pack_tiles(void *context, int64_t first, int64_t last, int, void *) {
    const auto *p = static_cast<const Pack *>(context);
    for (int64_t tile = first; tile < last; tile++) {
        if (p->w->kind == KQ_INT4) pack_codes<KQ_INT4>(p, tile);
        else if (p->w->kind == KQ_INT8) pack_codes<KQ_INT8>(p, tile);
        else pack_codes<KQ_BF16>(p, tile);
        if (p->w->kind != KQ_BF16) pack_scales(p, tile);
    }
}

void unpack_tiles(void *context, int64_t first, int64_t last, int, void *) {
    const auto *p = static_cast<const Pack *>(context);
    for (int64_t tile = first; tile < last; tile++) {
        unpack_codes(p, tile);
        if (p->w->kind != KQ_BF16) unpack_scales(p, tile);
    }
}

bool shape_is_possible(const kq_weight *w) {
    if (!w || w->n < 1 || w->k < 1 || w->n > kMaxOutputs || w->k > kMaxInputs) return false;
    if (w->kind == KQ_INT4) {
        const bool group = w->group == 32 || w->group == 64 || w->group == 128;
        return group && w->k % w->group == 0 && (w->has_zeros == 0 || w->has_zeros == 1);
    }
    // A bf16 matrix keeps its columns in place: nothing makes one with an order.
    const bool known = w->kind == KQ_INT8 || (w->kind == KQ_BF16 && !w->order);
    return known && w->group == 0 && w->has_zeros == 0;
}

Pack job_of(const kq_weight *w, const void *codes, const float *scales, const uint8_t *zeros) {
    return {w, static_cast<uint8_t *>(const_cast<void *>(codes)), const_cast<float *>(scales),
            const_cast<uint8_t *>(zeros), w->k * element_bytes(w)};
}

bool buffers_fit(const kq_weight *w, const void *codes, const float *scales) {
    return shape_is_possible(w) && codes && (scales || w->kind == KQ_BF16) && w->packed &&
           reinterpret_cast<uintptr_t>(w->packed) % 64 == 0;
}

}  // namespace

KQ_API int64_t kq_packed_bytes(const kq_weight *shape) { return shape_is_possible(shape) ? packed_bytes(shape) : -1; }

KQ_API int32_t kq_pack(const kq_weight *into, const void *codes, const float *scales, const uint8_t *zeros) {
    if (!buffers_fit(into, codes, scales) || (into->has_zeros && !zeros)) return -1;
    Pack pack = job_of(into, codes, scales, zeros);
    parallel_for(num_tiles(into), 4, pack_tiles, &pack);
    return 0;
}

KQ_API int32_t kq_unpack(const kq_weight *from, void *codes, float *scales, uint8_t *zeros) {
    if (!buffers_fit(from, codes, scales)) return -1;
    Pack pack = job_of(from, codes, scales, zeros);
    parallel_for(num_tiles(from), 4, unpack_tiles, &pack);
    return 0;
}
