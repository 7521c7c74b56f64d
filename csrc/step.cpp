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
int64_t lay_out(Workspace *w, const kq_model *model, int64_t rows, char *base) {
    const kq_layer *layer = model->layers;
    const int64_t widest = largest(largest(model->hidden_size, layer->out.k), layer->down.k);
    int64_t at = 0;
    place(&w->x, rows * model->hidden_size, base, &at);
    place(&w->normed, rows * model->hidden_size, base, &at);
    place(&w->qkv, rows * layer->qkv.n, base, &at);
    place(&w->mixed, rows * layer->out.k, base, &at);
    place(&w->act, rows * layer->down.k, base, &at);
    place(&w->codes, rows * code_stride(2 * round_up(widest, 64)), base, &at);  // bf16, the widest that there is
    place(&w->scales, rows * (widest / 32 + 1), base, &at);
    place(&w->sums, rows * (widest / 32 + 1), base, &at);
    return at;
}

bool reserve(const kq_model *model, int64_t rows) {
    Workspace sizes{};
    const int64_t bytes = lay_out(&sizes, model, rows, nullptr);
    if (bytes > workspace.bytes) {
        std::free(workspace.memory);
        workspace.memory = std::aligned_alloc(64, static_cast<size_t>(bytes));
        workspace.bytes = workspace.memory ? bytes : 0;
        if (!workspace.memory) return false;
    }
    lay_out(&workspace, model, rows, static_cast<char *>(workspace.memory));
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

/* One layer over all rows; the last one goes on after attention with those whose logits are wanted. */
int64_t run_layer(const kq_model *model, const kq_layer *layer, const kq_step *step, bool is_last) {
    Workspace *s = &workspace;
    const int64_t hidden = model->hidden_size;
    int64_t rows = step->places.rows;
    Activations in = prepared(&layer->qkv, s->x, hidden, rows, layer->attn_norm, model->eps);
    multiply(&layer->qkv, &in, s->qkv, layer->qkv.n, 0);
    kq_attention(&layer->cache, &step->places, s->qkv, layer->q_norm, layer->k_norm, model->eps, layer->window, s->mixed);
    if (is_last && step->num_logits < rows) {
        rows = step->num_logits;
        take_rows(s->mixed, step->logit_rows, rows, layer->out.k, s->mixed);
        take_rows(s->x, step->logit_rows, rows, hidden, s->x);
    }
    if (rows == 0) return 0;
    in = prepared(&layer->out, s->mixed, layer->out.k, rows, nullptr, 0);
    multiply(&layer->out, &in, s->x, hidden, 1);
    in = prepared(&layer->gate_up, s->x, hidden, rows, layer->mlp_norm, model->eps);
    multiply_swiglu(&layer->gate_up, &in, s->act, layer->down.k);
    in = prepared(&layer->down, s->act, layer->down.k, rows, nullptr, 0);
    multiply(&layer->down, &in, s->x, hidden, 1);
    return rows;
}

bool is_sound(const kq_model *model, const kq_step *step) {
    for (int64_t i = 0; i < step->places.rows; i++)
        if (step->ids[i] < 0 || step->ids[i] >= model->embed.n) return false;
    for (int64_t i = 0; i < step->num_logits; i++) {
        const int64_t row = step->logit_rows[i];
        if (row < 0 || row >= step->places.rows || (i > 0 && row <= step->logit_rows[i - 1])) return false;
    }
    return step->places.rows > 0 && model->num_layers > 0;
}

}  // namespace

KQ_API int32_t kq_run_step(const kq_model *model, const kq_step *step) {
    if (!is_sound(model, step)) return -1;
    begin_region();
    const bool has_room = reserve(model, step->places.rows);
    if (has_room) {
        int64_t rows = step->places.rows;
        kq_gather_rows(&model->embed, step->ids, rows, workspace.x);
        for (int64_t i = 0; i < model->num_layers; i++)
            rows = run_layer(model, &model->layers[i], step, i + 1 == model->num_layers);
        if (rows > 0) {
            const Activations in = prepared(&model->head, workspace.x, model->hidden_size, rows, model->norm, model->eps);
            multiply(&model->head, &in, step->logits, model->head.n, 0);
            if (step->hidden) __builtin_memcpy(step->hidden, workspace.normed, rows * model->hidden_size * 4);
        }
    }
    end_region();
    return has_room ? 0 : -2;
}
