/* Matrix products over the pool: inputs prepared once, then tiles and rows cut in pieces. */
#pragma once
#include "kernels.h"

/* x in the form that w multiplies, in memory that the next call takes again. */
Activations prepare(const kq_weight *w, const float *x, int64_t ldx, int64_t rows);
/* Whether so many rows are rounded for w, and rows first..last-1 of x->x so rounded into the codes, scales and sums that
 * x points to. */
bool is_rounded(const kq_weight *w, int64_t rows);
void round_rows(const kq_weight *w, const Activations *x, int64_t first, int64_t last);
/* y = x w^T + bias, or y += with accumulate. */
void multiply(const kq_weight *w, const Activations *x, float *y, int64_t ldy, int32_t accumulate);
/* y = silu(gate) * up of the halves of w's rows. */
void multiply_swiglu(const kq_weight *w, const Activations *x, float *y, int64_t ldy);
