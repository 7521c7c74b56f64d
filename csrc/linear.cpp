/* How a matrix product is spread over threads: pieces of tiles, and of rows where there are many. */
#include "linear.h"

#include <cstdlib>
#include <cstring>

#include "packed.h"
#include "threads.h"

namespace {

constexpr int64_t kRowBytes = 768 << 10;  // inputs of one piece: they stay in a core's second cache for all its tiles
constexpr int64_t kPieceBytes = 128 << 10;  // weights of a piece: what is asked for ahead is mostly still its own
constexpr int64_t kTileRowBytes = 1200 << 10;  // the same for the matrix unit, to which reading weights again costs more
constexpr int64_t kVeryFew = 4;           // rows for which four tiles are read at once, but two as well
constexpr int64_t kSwigluTiles = 16;      // tiles of gate that are computed before as many of up
constexpr int64_t kRowStep = 48;          // rows are cut at multiples of every kernel's block of rows

void *arena = nullptr;
int64_t arena_bytes = 0;

void *take_arena(int64_t bytes) {
    if (bytes > arena_bytes) {
        std::free(arena);
        arena_bytes = round_up(bytes, 1 << 16);
        arena = std::aligned_alloc(64, arena_bytes);
        if (!arena) std::abort();
    }
    return arena;
}

struct Rounding {
    const kq_weight *w;
    const Activations *x;
};

void round_piece(void *context, int64_t first, int64_t last, int, void *) {
    const auto *job = static_cast<const Rounding *>(context);
    round_rows(job->w, job->x, first, last);
}

struct Product {
    const kq_weight *w;
    const Activations *x;
    float *y;
    int64_t ldy;
    int32_t accumulate;
    int64_t tiles, tile_step;  // tiles to spread (gate only for swiglu), tiles a piece
    int64_t row_step;
};

struct Piece {
    Activations x;
    int64_t row, first, last;
};

Piece piece_of(const Product *p, int64_t index) {
    const int64_t across = (p->tiles + p->tile_step - 1) / p->tile_step;
    const int64_t row = index / across * p->row_step, first = index % across * p->tile_step;
    const int64_t end = row + p->row_step < p->x->rows ? row + p->row_step : p->x->rows;
    const int64_t last = first + p->tile_step < p->tiles ? first + p->tile_step : p->tiles;
    return {rows_of(p->w, p->x, row, end), row, first, last};
}

/* Pieces first..last-1. Those of few rows lie side by side: they are one run of tiles, read without a break. */
struct Run {
    Piece piece;
    int64_t next;
};

Run run_of(const Product *p, int64_t first, int64_t last, int64_t most_tiles) {
    Run run{piece_of(p, first), first + 1};
    while (p->x->rows <= kRowStep && run.next < last && run.piece.last + p->tile_step - run.piece.first <= most_tiles)
        run.piece.last = piece_of(p, run.next++).last;
    return run;
}

void product_piece(void *context, int64_t first, int64_t last, int, void *scratch) {
    const auto *p = static_cast<const Product *>(context);
    while (first < last) {
        const Run run = run_of(p, first, last, p->tiles);
        const Piece *piece = &run.piece;
        active_kernels()->linear(p->w, &piece->x, piece->first, piece->last,
                                 p->y + piece->row * p->ldy + piece->first * kTile, p->ldy, p->accumulate, scratch);
        first = run.next;
    }
}

void swiglu_piece(void *context, int64_t first, int64_t last, int, void *scratch) {
    const auto *p = static_cast<const Product *>(context);
    const Kernels *kernels = active_kernels();
    auto *both = reinterpret_cast<float *>(static_cast<char *>(scratch) + kLinearScratch);
    while (first < last) {
        const Run run = run_of(p, first, last, kSwigluTiles);
        const Piece *piece = &run.piece;
        const int64_t columns = (piece->last - piece->first) * kTile;
        kernels->linear(p->w, &piece->x, piece->first, piece->last, both, 2 * columns, 0, scratch);
        kernels->linear(p->w, &piece->x, piece->first + p->tiles, piece->last + p->tiles, both + columns, 2 * columns,
                        0, scratch);
        for (int64_t m = 0; m < piece->x.rows; m++) {
            const float *row = both + m * 2 * columns;
            kernels->swiglu(row, row + columns, columns, p->y + (piece->row + m) * p->ldy + piece->first * kTile);
        }
        first = run.next;
    }
}

int64_t at_least(int64_t value, int64_t bound) { return value < bound ? bound : value; }

/* Few rows: the weights' bytes are what costs. Threads take long runs first, because what is asked for ahead at the end
 * of a run is another thread's, and short ones last, for an even end. Many rows: a piece's inputs fit a core's cache, and
 * there are some pieces a thread even where tiles are few. */
Product cut(const kq_weight *w, const Activations *x, float *y, int64_t ldy, int32_t accumulate, int64_t tiles) {
    if (x->rows <= kRowStep) return {w, x, y, ldy, accumulate, tiles, x->rows <= kVeryFew ? 2 : 4, kRowStep};
    const int64_t threads = num_threads(), enough = at_least(kPieceBytes / tile_bytes(w), tiles / (24 * threads));
    const int64_t input_bytes = x->codes ? rounded_bytes(w) : 4 * x->k;
    int64_t row_step = at_least((active_kernels()->round ? kTileRowBytes : kRowBytes) / input_bytes / kRowStep, 1) * kRowStep;
    const int64_t even = tiles / (8 * threads) < enough ? tiles / (8 * threads) : enough;
    const int64_t tile_step = at_least(even / 4 * 4, tiles < 4 * threads ? 1 : 4);
    const int64_t chunks = (x->rows + row_step - 1) / row_step;
    row_step = round_up((x->rows + chunks - 1) / chunks, kRowStep);
    while (row_step > kRowStep && tiles / 2 * ((x->rows + row_step - 1) / row_step) < 4 * threads) {
        row_step = round_up(row_step / 2, kRowStep);
    }
    return {w, x, y, ldy, accumulate, tiles, tile_step > 16 ? 16 : tile_step, row_step};
}

void spread(Product *p, PieceFn fn) {
    const int64_t down = (p->x->rows + p->row_step - 1) / p->row_step;
    const int64_t grain = p->x->rows <= kRowStep ? kShrinking : 1;
    parallel_for(down * ((p->tiles + p->tile_step - 1) / p->tile_step), grain, fn, p);
}

void gather_row(const kq_weight *w, int64_t id, float *out) {
    const int64_t tile = id / kTile, lane = id % kTile;
    const uint8_t *codes = tile_codes(w, tile) + lane * 4;
    for (int64_t i = 0; i < w->k; i++) {
        float value;
        if (w->kind == KQ_BF16) {
            uint32_t bits = 0;
            std::memcpy(reinterpret_cast<char *>(&bits) + 2, codes + i / 2 * 64 + i % 2 * 2, 2);
            std::memcpy(&value, &bits, 4);
        } else if (w->kind == KQ_INT8) {
            value = static_cast<float>(codes[i / 4 * 64 + i % 4] - 128) * tile_scales_f32(w, tile)[lane];
        } else {
            const int64_t g = i / w->group * kTile + lane;
            const int code = codes[i / 8 * 64 + i % 4] >> (i % 8 < 4 ? 0 : 4) & 15;
            const int zero = w->has_zeros ? tile_zeros(w, tile)[g] : 8;
            value = static_cast<float>(code - zero) * from_f16(tile_scales_f16(w, tile)[g]);
        }
        out[w->order ? w->order[i] : i] = value;
    }
}

struct Gather {
    const kq_weight *w;
    const int64_t *ids;
    float *out;
};

void gather_piece(void *context, int64_t first, int64_t last, int, void *) {
    const auto *job = static_cast<const Gather *>(context);
    for (int64_t i = first; i < last; i++) gather_row(job->w, job->ids[i], job->out + i * job->w->k);
}

struct Norm {
    const float *x, *weight;
    float eps;
    int64_t size;
    float *y;
};

void norm_piece(void *context, int64_t first, int64_t last, int, void *) {
    const auto *job = static_cast<const Norm *>(context);
    for (int64_t m = first; m < last; m++) {
        active_kernels()->rms_norm(job->x + m * job->size, job->weight, job->eps, job->size, job->y + m * job->size);
    }
}

}  // namespace

bool is_rounded(const kq_weight *w, int64_t rows) {
    const Kernels *kernels = active_kernels();
    return w->kind != KQ_BF16 || (kernels->round && rows >= kernels->round_from);
}

void round_rows(const kq_weight *w, const Activations *x, int64_t first, int64_t last) {
    auto *codes = const_cast<int8_t *>(x->codes);
    if (w->kind == KQ_BF16) active_kernels()->round(x->x, x->ldx, x->k, first, last, codes);
    else
        active_kernels()->quantize(x->x, x->ldx, w->order, x->k, w->group, first, last, codes,
                                   const_cast<float *>(x->scales), const_cast<int32_t *>(x->sums));
}

Activations prepare(const kq_weight *w, const float *x, int64_t ldx, int64_t rows) {
    const int64_t groups = w->group ? w->k / w->group : 1;
    Activations out{rows, w->k, padded_k(w), groups, x, ldx, nullptr, nullptr, nullptr};
    if (!is_rounded(w, rows)) return out;
    const int64_t codes = rows * rounded_bytes(w), numbers = round_up(rows * out.groups * 4, 64);
    auto *memory = static_cast<int8_t *>(take_arena(codes + 2 * numbers));
    out.codes = memory;
    out.scales = reinterpret_cast<float *>(memory + codes);
    out.sums = reinterpret_cast<int32_t *>(memory + codes + numbers);
    Rounding job{w, &out};
    parallel_for(rows, at_least(32768 / w->k, 1), round_piece, &job);
    return out;
}

void multiply(const kq_weight *w, const Activations *x, float *y, int64_t ldy, int32_t accumulate) {
    Product product = cut(w, x, y, ldy, accumulate, num_tiles(w));
    spread(&product, product_piece);
}

void multiply_swiglu(const kq_weight *w, const Activations *x, float *y, int64_t ldy) {
    Product product = cut(w, x, y, ldy, 0, num_tiles(w) / 2);
    const int64_t room = static_cast<int64_t>(kScratchBytes - kLinearScratch) / (2 * kTile * int64_t{sizeof(float)});
    const int64_t rows = x->rows < product.row_step ? x->rows : product.row_step;
    const int64_t widest = at_least(room / rows, 1);
    if (rows > room) product.row_step = room;
    if (product.tile_step > widest) product.tile_step = widest;
    spread(&product, swiglu_piece);
}

KQ_API void kq_linear(const kq_weight *w, const float *x, int64_t ldx, int64_t rows, float *y, int64_t ldy,
                      int32_t accumulate) {
    if (rows < 1) return;
    begin_region();
    const Activations prepared = prepare(w, x, ldx, rows);
    multiply(w, &prepared, y, ldy, accumulate);
    end_region();
}

KQ_API void kq_linear_swiglu(const kq_weight *w, const float *x, int64_t ldx, int64_t rows, float *y, int64_t ldy) {
    if (rows < 1) return;
    begin_region();
    const Activations prepared = prepare(w, x, ldx, rows);
    multiply_swiglu(w, &prepared, y, ldy);
    end_region();
}

KQ_API void kq_gather_rows(const kq_weight *w, const int64_t *ids, int64_t rows, float *out) {
    Gather job{w, ids, out};
    parallel_for(rows, at_least(16384 / w->k, 1), gather_piece, &job);
}

KQ_API void kq_rms_norm(const float *x, const float *weight, float eps, int64_t rows, int64_t size, float *y) {
    Norm job{x, weight, eps, size, y};
    parallel_for(rows, at_least(32768 / size, 1), norm_piece, &job);
}
