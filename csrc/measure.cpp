/* What the machine can do: `kiloq bench` shows it beside the speed of models. It is in the library, and not in a
 * program of its own, so that it reads with the threads and the pool that the kernels are judged with. */
#include <atomic>

#include "kernels.h"
#include "threads.h"

namespace {

struct Read {
    const char *data;
    std::atomic<uint64_t> sum;
};

constexpr int64_t kChunk = 1 << 20;
typedef uint64_t Pair __attribute__((vector_size(16)));

/* Four streams side by side, as the products read four tiles: one alone does not keep the memory busy. */
void read_piece(void *context, int64_t first, int64_t last, int, void *) {
    auto *job = static_cast<Read *>(context);
    constexpr int64_t kStream = kChunk / 4;
    Pair sums[4] = {};
    for (const char *chunk = job->data + first * kChunk; chunk < job->data + last * kChunk; chunk += kChunk) {
        for (int64_t at = 0; at < kStream; at += 64) {
            for (int s = 0; s < 4; s++) {
                const auto *line = reinterpret_cast<const Pair *>(chunk + s * kStream + at);
                __builtin_prefetch(line + 256);
                sums[s] += (line[0] + line[1]) + (line[2] + line[3]);
            }
        }
    }
    sums[0] += sums[1] + sums[2] + sums[3];
    job->sum += sums[0][0] + sums[0][1];
}

}  // namespace

KQ_API uint64_t kq_read(const void *data, int64_t bytes) {
    Read job{static_cast<const char *>(data), {0}};
    parallel_for(bytes / kChunk, 1, read_piece, &job);
    return job.sum;
}
