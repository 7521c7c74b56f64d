/* The pool: one job at a time, cut in pieces that threads take as they come.
 *
 * A thread that was taken away by another process delays only the piece in its hands. Waiting threads spin for some
 * microseconds, because the next phase of a step is that near, and then sleep. Callers from several threads take
 * turns. After fork() the child begins with a pool of its own. Denormals are flushed to zero in all that runs here. */
#pragma once
#include <cstddef>
#include <cstdint>

typedef void (*PieceFn)(void *context, int64_t first, int64_t last, int thread, void *scratch);

constexpr int64_t kShrinking = -1;  // a grain: long pieces first, one by one at the end

/* Call fn for 0..count-1 in pieces of at most `grain`, on all threads; returns when all are done. Each thread has
 * kScratchBytes of its own. Pieces must not call parallel_for. count < 2^32. */
void parallel_for(int64_t count, int64_t grain, PieceFn fn, void *context);

/* Between begin and end, workers wait for the next call without sleeping, and no other caller comes in between. May be
 * nested. The caller's own arithmetic flushes denormals as well. */
void begin_region();
void end_region();

int num_threads();

/* The caller's own scratch memory, within a region and outside parallel_for. */
void *caller_scratch();
