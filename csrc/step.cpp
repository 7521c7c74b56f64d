/* A whole step of a model: ids in, logits out, one call. What the op-by-op model computes, in the same order.
 *
 * Each line of a layer is one phase of the pool. What is small for few tokens (norms, rounding) the caller does alone
 * between phases; for many tokens it is spread too. The residual stream x stays fp32. */
#include <cstdlib>

#include "kernels.h"
#include "linear.h"
#include "packed.h"
#include "threads.h"

namespace {

constexpr int64_t kAlone = 16384;  // numbers that one thread norms and rounds sooner than others are called

/* Grows and is kept: a step of a running engine allocates nothing. */
struct Workspace {
    void *memory;
    int64_t bytes;
    float *x, *normed, *qkv, *mixed, *act;  // [T, hidden], [T, hidden], [T, (H + 2K) D], [T, H D], [T, intermediate]
    float *low, *wide;                      // only with updates: [T, rank], [T, 2 intermediate]
    int8_t *codes;                          // of what the next matrix multiplies
    float *scales;
    int32_t *sums;
};

Workspace workspace{};

template <typename T>
void place(T **pointer, int64_t count, char *base, int64_t *at) {
    *pointer = reinterpret_cast<T *>(base + *at);
    *at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
}

int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* Where everything lies from `base` on; returns the bytes that takes. */
int64_t lay_out(Workspace *w, const kq_model *model, const kq_step *step, char *base) {
    const kq_layer *layer = model->layers;
    const int64_t rows = step->places.rows;
    int64_t rank = 0;
    for (int64_t i = 0; i < step->num_adapted; i++) rank = largest(rank, step->adapted[i].rank);
    const int64_t widest = largest(largest(model->hidden_size, layer->out.k), largest(layer->down.k, rank));
    int64_t at = 0;
    place(&w->x, rows * model->hidden_size, base, &at);
    place(&w->normed, rows * model->hidden_size, base, &at);
    place(&w->qkv, rows * layer->qkv.n, base, &at);
    place(&w->mixed, rows * layer->out.k, base, &at);
    place(&w->act, rows * layer->down.k, base, &at);
    place(&w->low, rows * rank, base, &at);
    place(&w->wide, rank ? rows * layer->gate_up.n : 0, base, &at);
    place(&w->codes, rows * code_stride(2 * round_up(widest, 64)), base, &at);  // bf16, the widest that there is
    place(&w->scales, rows * (widest / 32 + 1), base, &at);
    place(&w->sums, rows * (widest / 32 + 1), base, &at);
    return at;
}

bool reserve(const kq_model *model, const kq_step *step) {
    Workspace sizes{};
    const int64_t bytes = lay_out(&sizes, model, step, nullptr);
    if (bytes > workspace.bytes) {
        std::free(workspace.memory);
        workspace.memory = std::aligned_alloc(64, static_cast<size_t>(bytes));
        workspace.bytes = workspace.memory ? bytes : 0;
        if (!workspace.memory) return false;
    }
    lay_out(&workspace, model, step, static_cast<char *>(workspace.memory));
    return true;
}

struct Prepare {
    const kq_weight *w;
    const float *x;
    int64_t ldx;
    const float *gain;  // NULL: no norm
    float eps;
    float *normed;      // [rows, k]
    Activations out;
};

void prepare_piece(void *context, int64_t first, int64_t last, int, void *) {
    const auto *job = static_cast<const Prepare *>(context);
    const Activations *out = &job->out;
    const Kernels *kernels = active_kernels();
    for (int64_t m = first; m < last; m++) {
        if (job->gain)
            kernels->rms_norm(job->x + m * job->ldx, job->gain, job->eps, out->k, job->normed + m * out->k);
        if (out->codes) round_rows(job->w, out, m, m + 1);
    }
}

/* Rows of x, normed with `gain` (or as they are), in the form that w multiplies; good until the next call. */
Activations prepared(const kq_weight *w, const float *x, int64_t ldx, int64_t rows, const float *gain, float eps) {
    const bool rounds = is_rounded(w, rows);
    const float *input = gain ? workspace.normed : x;
    Prepare job{w, x, ldx, gain, eps, workspace.normed,
                {rows, w->k, padded_k(w), w->group ? w->k / w->group : 1, input, gain ? w->k : ldx,
                 rounds ? workspace.codes : nullptr, workspace.scales, workspace.sums}};
    if (gain || rounds) parallel_for(rows, largest(kAlone / w->k, 1), prepare_piece, &job);
    return job.out;
}

/* to[i] = from[rows[i]]; in place where rows ascend, as no row moves upwards. */
void take_rows(const float *from, const int64_t *rows, int64_t count, int64_t size, float *to) {
    for (int64_t i = 0; i < count; i++)
        if (to + i * size != from + rows[i] * size) __builtin_memmove(to + i * size, from + rows[i] * size, size * 4);
}

/* How many of the logits' rows lie before this one. */
int64_t kept_before(const kq_step *step, int64_t row) {
    int64_t count = 0;
    while (count < step->num_logits && step->logit_rows[count] < row) count++;
    return count;
}

using Updated = kq_update kq_layer_updates::*;

bool any_update(const kq_step *step, int64_t layer, Updated matrix) {
    for (int64_t i = 0; i < step->num_adapted; i++)
        if ((step->adapted[i].layers[layer].*matrix).down.n) return true;
    return false;
}

/* y += up (down x) in the rows of each adapter that updates this matrix; is_cut: only rows with logits are left. */
void add_updates(const kq_step *step, int64_t layer, Updated matrix, bool is_cut, const float *x, int64_t ldx, float *y,
                 int64_t ldy) {
    for (int64_t i = 0; i < step->num_adapted; i++) {
        const kq_adapted *adapted = &step->adapted[i];
        const kq_update *update = &(adapted->layers[layer].*matrix);
        int64_t first = adapted->first_row, last = first + adapted->rows;
        if (is_cut) first = kept_before(step, first), last = kept_before(step, last);
        if (update->down.n == 0 || first == last) continue;
        Activations in = prepared(&update->down, x + first * ldx, ldx, last - first, nullptr, 0);
        multiply(&update->down, &in, workspace.low, update->down.n, 0);
        in = prepared(&update->up, workspace.low, update->down.n, last - first, nullptr, 0);
        multiply(&update->up, &in, y + first * ldy, ldy, 1);
    }
}

struct Gate {
    const float *wide;
    int64_t size;
    float *act;
};

void gate_piece(void *context, int64_t first, int64_t last, int, void *) {
    const auto *job = static_cast<const Gate *>(context);
    for (int64_t m = first; m < last; m++) {
        const float *row = job->wide + 2 * m * job->size;
        active_kernels()->swiglu(row, row + job->size, job->size, job->act + m * job->size);
    }
}

/* act = silu(gate) * up; with updates, gate and up are written out before. */
void run_gate(const kq_layer *layer, const kq_step *step, int64_t index, bool is_cut, const Activations *in) {
    Workspace *s = &workspace;
    const int64_t size = layer->down.k;
    if (!any_update(step, index, &kq_layer_updates::gate_up)) {
        multiply_swiglu(&layer->gate_up, in, s->act, size);
        return;
    }
    multiply(&layer->gate_up, in, s->wide, 2 * size, 0);
    add_updates(step, index, &kq_layer_updates::gate_up, is_cut, in->x, in->ldx, s->wide, 2 * size);
    Gate job{s->wide, size, s->act};
    parallel_for(in->rows, largest(kAlone / size, 1), gate_piece, &job);
}

/* One layer over all rows; the last one goes on after attention with those whose logits are wanted. */
int64_t run_layer(const kq_model *model, const kq_step *step, int64_t index) {
    Workspace *s = &workspace;
    const kq_layer *layer = &model->layers[index];
    const int64_t hidden = model->hidden_size;
    int64_t rows = step->places.rows;
    Activations in = prepared(&layer->qkv, s->x, hidden, rows, layer->attn_norm, model->eps);
    multiply(&layer->qkv, &in, s->qkv, layer->qkv.n, 0);
    add_updates(step, index, &kq_layer_updates::qkv, false, in.x, in.ldx, s->qkv, layer->qkv.n);
    kq_attention(&layer->cache, &step->places, s->qkv, layer->q_norm, layer->k_norm, model->eps, layer->window, s->mixed);
    const bool is_cut = index + 1 == model->num_layers && step->num_logits < rows;
    if (is_cut) {
        rows = step->num_logits;
        take_rows(s->mixed, step->logit_rows, rows, layer->out.k, s->mixed);
        take_rows(s->x, step->logit_rows, rows, hidden, s->x);
    }
    if (rows == 0) return 0;
    in = prepared(&layer->out, s->mixed, layer->out.k, rows, nullptr, 0);
    multiply(&layer->out, &in, s->x, hidden, 1);
    add_updates(step, index, &kq_layer_updates::out, is_cut, s->mixed, layer->out.k, s->x, hidden);
    in = prepared(&layer->gate_up, s->x, hidden, rows, layer->mlp_norm, model->eps);
    run_gate(layer, step, index, is_cut, &in);
    in = prepared(&layer->down, s->act, layer->down.k, rows, nullptr, 0);
    multiply(&layer->down, &in, s->x, hidden, 1);
    add_updates(step, index, &kq_layer_updates::down, is_cut, s->act, layer->down.k, s->x, hidden);
    return rows;
}

bool is_sound(const kq_model *model, const kq_step *step) {
    for (int64_t i = 0; i < step->places.rows; i++)
        if (step->ids[i] < 0 || step->ids[i] >= model->embed.n) return false;
    for (int64_t i = 0; i < step->num_logits; i++) {
        const int64_t row = step->logit_rows[i];
        if (row < 0 || row >= step->places.rows || (i > 0 && row <= step->logit_rows[i - 1])) return false;
    }
    for (int64_t i = 0; i < step->num_adapted; i++) {
        const kq_adapted *adapted = &step->adapted[i];
        if (adapted->first_row < 0 || adapted->rows < 0 || adapted->first_row + adapted->rows > step->places.rows)
            return false;
    }
    return step->places.rows > 0 && model->num_layers > 0;
}

}  // namespace

KQ_API int32_t kq_run_step(const kq_model *model, const kq_step *step) {
    if (!is_sound(model, step)) return -1;
    begin_region();
    const bool has_room = reserve(model, step);
    if (has_room) {
        int64_t rows = step->places.rows;
        kq_gather_rows(&model->embed, step->ids, rows, workspace.x);
        for (int64_t i = 0; i < model->num_layers; i++)
            rows = run_layer(model, step, i);
        if (rows > 0) {
            const Activations in = prepared(&model->head, workspace.x, model->hidden_size, rows, model->norm, model->eps);
            multiply(&model->head, &in, step->logits, model->head.n, 0);
            if (step->hidden) __builtin_memcpy(step->hidden, workspace.normed, rows * model->hidden_size * 4);
        }
    }
    end_region();
    return has_room ? 0 : -2;
}
