/* What each instruction set provides, and what crosses the borders between the files of csrc/. */
#pragma once
#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "kiloq.h"

/* Rows of inputs, prepared once for a matrix and shared by all its tiles. */
struct Activations {
    int64_t rows, k;
    int64_t k_padded;      // k rounded up to 64; codes beyond k are zero
    int64_t groups;        // scales a row: k / group, or 1
    const float *x;        // [rows, ldx] fp32, in the weight's column order; what KQ_BF16 multiplies
    int64_t ldx;
    // Rows code_stride(k) bytes apart (packed.h). KQ_BF16: NULL, or x as bf16, rows code_stride(2 * k_padded) apart.
    const int8_t *codes;
    const float *scales;   // [rows, groups]
    const int32_t *sums;   // [rows, groups], sums of codes
};

constexpr int64_t kTile = 16;              // rows of a weight matrix that lie side by side in one vector
constexpr int64_t kDrawBlock = 64;         // logits whose largest is looked for together
constexpr size_t kScratchBytes = 4 << 20;  // each thread's own scratch, 64-byte aligned
constexpr size_t kLinearScratch = 2 << 20; // the first part of it, all that Kernels.linear touches

/* Kernels work on a part of the output and on one thread; threads.h spreads them. No allocation, no state. */
struct Kernels {
    const char *name;
    // Rows first..last-1 of x (stride ldx) to codes, scales and sums; `order` is kq_weight.order; group 0: whole rows.
    void (*quantize)(const float *x, int64_t ldx, const int32_t *order, int64_t k, int64_t group, int64_t first,
                     int64_t last, int8_t *codes, float *scales, int32_t *sums);
    // The same for KQ_BF16, with k padded to 64 by zeros; NULL where fp32 is multiplied.
    void (*round)(const float *x, int64_t ldx, int64_t k, int64_t first, int64_t last, int8_t *codes);
    int64_t round_from;  // rows from which it pays
    // Tiles first..last-1 (16 outputs each) of all rows of x. y[m * ldy + (j - 16 * first)]: y points at the first
    // tile's column; columns at or beyond w->n are not written. Bias is added; accumulate: y +=.
    void (*linear)(const kq_weight *w, const Activations *x, int64_t first, int64_t last, float *y, int64_t ldy,
                   int32_t accumulate, void *scratch);
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t size, float *y);   // one row
    void (*swiglu)(const float *gate, const float *up, int64_t size, float *y);
    // For draw.cpp. The largest of x and of each of its blocks of kDrawBlock; NaN if x holds one.
    float (*block_peaks)(const float *x, int64_t size, float *peaks);
    double (*tempered)(const float *x, int64_t size, float peak, float inverse, float *w);  // exp((x - peak) * inverse); sum
    int64_t (*places_from)(const float *w, int64_t size, float floor, int32_t *places);  // where w >= floor; how many
    void (*add_row)(const float *from, int64_t size, float *to);
    // Positions first..last-1 of a span, kv heads head..head_end-1: k normed and turned, k and v written to the cache.
    void (*write)(const AttendArgs *args, const kq_span *span, int64_t head, int64_t head_end, int64_t first,
                  int64_t last, void *scratch);
    void (*attend)(const AttendArgs *args, const AttendTask *task, void *scratch);
    // The parts of a task's rows, `parts` arrays of task_floats that follow each other at `partial`, into args->out.
    void (*merge)(const AttendArgs *args, const AttendTask *task, const float *partial, int64_t parts);
};

/* Each of its own file, compiled with its own flags; NULL where the compiler did not know them. */
const Kernels *kernels_avx2();
const Kernels *kernels_avxvnni();  // avx2 with its dot product of bytes
const Kernels *kernels_avx512();
const Kernels *kernels_amx();      // avx512 with matrix tiles where they pay
const Kernels *active_kernels();
