/* The C interface of kiloq's CPU kernels. Plain C, no Python, no PyTorch: numbers and pointers.
 *
 * Matrices are row-major. `packed` buffers are opaque and start at multiples of 64 bytes. Every call that computes
 * uses the pool of threads.h and returns when the work is done; calls from several threads take turns.
 * Functions that can be asked for the impossible return 0 for done and a negative number for refused. */
#pragma once
#include <stdint.h>

#define KQ_API extern "C" __attribute__((visibility("default")))

/* Changes whenever a structure or a packed layout below changes: the binding refuses a library of another version. */
#define KQ_VERSION 2

enum kq_kind { KQ_BF16 = 0, KQ_INT8 = 1, KQ_INT4 = 2 };

/* y[m, j] = sum_i x[m, i] * w[j, i] + bias[j], with w[j, i] = scales[j, i / group] * (code[j, i] - zero[j, i / group]).
 * Codes are 0..15 (KQ_INT4, zero 8 where there are no zeros) or -127..127 (KQ_INT8, group 0: one scale a row, zero 0).
 * Integer kinds multiply activations that were rounded to int8, absmax / 127 = 1 step, half to even: per row of x
 * (KQ_INT8) or per row and group (KQ_INT4). KQ_BF16 multiplies fp32 activations, rounded to bf16 only where the
 * processor's matrix unit is used. */
typedef struct {
    int32_t kind;         /* kq_kind */
    int32_t group;        /* KQ_INT4: 32, 64 or 128, dividing k; else 0 */
    int32_t has_zeros;    /* KQ_INT4: each group has a zero of its own */
    int32_t reserved;
    int64_t n, k;         /* rows (outputs), columns (inputs) */
    void *packed;         /* kq_packed_bytes long */
    const float *bias;    /* [n], or NULL */
    const int32_t *order; /* [k], column j of the packed matrix multiplies input order[j]; or NULL */
} kq_weight;

KQ_API int32_t kq_version(void);

/* "amx", "avx512", "avxvnni" or "avx2": what runs. The best that this processor has unless kq_choose named a lesser one. */
KQ_API const char *kq_backend(void);
KQ_API int32_t kq_choose(const char *backend); /* -1: unknown, or this processor lacks it */
KQ_API int32_t kq_supports(const char *backend);

KQ_API void kq_set_threads(int32_t threads); /* >= 1, the caller included */
KQ_API int32_t kq_threads(void);
KQ_API void kq_visit(int64_t count, int64_t grain, int32_t *visits); /* visits[i]++ by the pool: what its tests count */

/* Packing: canonical codes to the kernels' layout and back. codes: uint8 [n, k] (KQ_INT4), int8 [n, k] (KQ_INT8),
 * bf16 as uint16 [n, k] (KQ_BF16, no scales). scales: fp32 [n, k / group] or [n], kept as fp16 for KQ_INT4.
 * zeros: uint8 [n, k / group] or NULL. */
KQ_API int64_t kq_packed_bytes(const kq_weight *shape); /* -1: impossible shape */
KQ_API int32_t kq_pack(const kq_weight *into, const void *codes, const float *scales, const uint8_t *zeros);
KQ_API int32_t kq_unpack(const kq_weight *from, void *codes, float *scales, uint8_t *zeros);

/* y: fp32 [rows, n] with row stride ldy; x: fp32 [rows, k] with row stride ldx. accumulate: y += instead of y =. */
KQ_API void kq_linear(const kq_weight *w, const float *x, int64_t ldx, int64_t rows, float *y, int64_t ldy,
                      int32_t accumulate);
/* The same, y = silu(gate) * up of the two halves of w's rows, gate first. y: [rows, n / 2]. n / 2 % 16 == 0. */
KQ_API void kq_linear_swiglu(const kq_weight *w, const float *x, int64_t ldx, int64_t rows, float *y, int64_t ldy);
/* Rows `ids` of w as fp32: out [rows, k]. The embedding. */
KQ_API void kq_gather_rows(const kq_weight *w, const int64_t *ids, int64_t rows, float *out);

/* Read memory (from a multiple of 64 on) on all threads, whole pieces of 1 MB, and sum it: for measurements of
 * bandwidth. */
KQ_API uint64_t kq_read(const void *data, int64_t bytes);

/* y = x / sqrt(mean(x^2) + eps) * weight, rows of `size`. */
KQ_API void kq_rms_norm(const float *x, const float *weight, float eps, int64_t rows, int64_t size, float *y);

/* --- The paged cache of one layer. Slot = block * block_size + offset. ------------------------------------------- */

enum kq_cache_kind { KQ_CACHE_BF16 = 0, KQ_CACHE_INT8 = 1, KQ_CACHE_F32 = 2 };

/* int8: value = code * scale, codes -127..127, one fp16 scale per slot and head, absmax / 127 rounded to fp16 first. */
typedef struct {
    int32_t kind;               /* kq_cache_kind */
    int32_t block_size;
    int32_t num_heads, num_kv_heads, head_dim, rotary_dim;
    void *keys, *values;        /* [slots, K, D] bf16 (as uint16), int8 or fp32 */
    void *key_scales, *value_scales; /* int8: [slots, K] fp16 */
    /* int8, or NULL: the bias of the key projection, [K, D] fp32. Keys are kept without their turned bias, which is
     * added back in the dot product: a few channels of it dwarf all else in models v1 to 2.5. Channels whose bias is
     * small are better left at 0 here: pairs of zeros cost nothing. Not together with k_norm. */
    const float *key_bias;
} kq_cache;

/* One sequence's part of a step: rows first_row .. first_row + stop - start - 1 are its positions start..stop-1. */
typedef struct {
    int64_t first_row;
    int64_t start, stop;
    const int32_t *blocks;      /* all that hold positions before stop */
    /* int8 with key_bias: the angles of every position from 0 to at least stop - 1, [>= max(stop, 16),
     * rotary_dim / 2] fp32, under the sequence's own NTK factor; else NULL. */
    const float *cos, *sin;
} kq_span;

/* Turn q and k, write k and v to the cache, attend. qkv: fp32 [T, (H + 2K) * D]; out: [T, H * D].
 * cos, sin: [T, rotary_dim / 2]; q_scale: [T] or NULL; q_norm, k_norm: gains [D] applied before turning, or NULL;
 * window: how many tokens a token sees, itself included; 0 for all. Scores are scaled by 1 / sqrt(D).
 * D is a multiple of 8 up to 256, block_size a multiple of 16. No span may read slots that another span of the same
 * call writes: spans are not ordered. */
typedef struct {
    int64_t rows;
    const float *cos, *sin, *q_scale;
    int64_t num_spans;
    const kq_span *spans;
} kq_places;

KQ_API void kq_attention(const kq_cache *cache, const kq_places *places, const float *qkv, const float *q_norm,
                         const float *k_norm, float eps, int32_t window, float *out);

/* --- Choosing tokens --------------------------------------------------------------------------------------------- */

/* What one row of logits is asked for: kiloq/ops/draw.py says what it means. The logits stay as they are. */
typedef struct {
    const float *logits;
    int64_t num_shifts;                /* scores of shift_ids: s > 0 ? s / divide : s * divide, + add */
    const int64_t *shift_ids;
    const double *divide, *add;
    const uint8_t *allowed;            /* [size], 0: may not be drawn; NULL: all may */
    double temperature;                /* 0: the first of the largest */
    double top_p, min_p, uniform;      /* uniform: in [0, 1) */
    int64_t top_k;                     /* 0: no limit */
} kq_draw;

/* tokens[i]: of row i; -1 if its logits hold NaN, infinity or nothing finite, -2 if none of those allowed is finite.
 * -1: a size that the threads' scratch cannot hold, or an id that is no token. */
KQ_API int32_t kq_draw_tokens(const kq_draw *draws, int64_t count, int64_t size, int64_t *tokens);

/* --- A whole step from a plan of pointers ----------------------------------------------------------------------- */

typedef struct {
    kq_weight qkv, out, gate_up, down;
    const float *attn_norm, *mlp_norm; /* [hidden] */
    const float *q_norm, *k_norm;      /* [D] or NULL */
    kq_cache cache;
    int32_t window;
    int32_t reserved;
} kq_layer;

typedef struct {
    int64_t num_layers, hidden_size, intermediate_size;
    float eps;
    int32_t reserved;
    const kq_layer *layers;
    kq_weight embed, head;             /* tied: the same pointers */
    const float *norm;                 /* [hidden] */
} kq_model;

/* y += up (down x): a low-rank update of a matrix. down.n is 0 where there is none, else equal to up.k. */
typedef struct {
    kq_weight down, up;
} kq_update;

typedef struct {
    kq_update qkv, out, gate_up, down;
} kq_layer_updates;

/* Rows first_row .. first_row + rows - 1 of a step take these updates, one for each layer. */
typedef struct {
    int64_t first_row, rows;
    int64_t rank;                      /* the largest down.n */
    const kq_layer_updates *layers;
} kq_adapted;

typedef struct {
    const int64_t *ids;                /* [T] */
    kq_places places;
    int64_t num_logits;
    const int64_t *logit_rows;         /* [num_logits], rows whose logits are wanted, ascending */
    float *logits;                     /* [num_logits, vocab] */
    float *hidden;                     /* [num_logits, hidden] after the final norm, or NULL */
    int64_t num_adapted;
    const kq_adapted *adapted;         /* no row twice */
} kq_step;

/* -1: an id or a row that the model or the step does not have; -2: no memory. Nothing was computed then. */
KQ_API int32_t kq_run_step(const kq_model *model, const kq_step *step);
