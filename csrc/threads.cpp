#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include <immintrin.h>

#include "kernels.h"

namespace {

constexpr int kSpins = 2000;             // about 40 us of pauses: longer than the gap between two phases
constexpr unsigned kFlushDenormals = 0x8040;  // FTZ | DAZ

struct Job {
    PieceFn fn = nullptr;
    void *context = nullptr;
    int64_t count = 0, grain = 1;
};

struct Pool {
    std::vector<std::thread> workers;
    std::vector<void *> scratch;
    std::mutex mutex;
    std::condition_variable wake;
    Job job;
    // generation << 40 | next item, in one word, so that a late worker never takes a piece of another job. Odd
    // generations are closed: the caller is writing the next job, and nobody may look at it.
    alignas(64) std::atomic<uint64_t> ticket{0};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<int> readers{0};
    std::atomic<bool> in_region{false};
    std::atomic<int> sleepers{0};
    std::atomic<bool> stop{false};
};

Pool *pool = nullptr;
int wanted = 0;

constexpr int kItemBits = 40;
constexpr uint64_t kItemMask = (1ull << kItemBits) - 1;

/* Take pieces of generation `generation` until none are left. */
void work(uint64_t generation, const Job &job, int thread) {
    uint64_t seen = pool->ticket.load(std::memory_order_acquire);
    for (;;) {
        if (seen >> kItemBits != generation) return;
        const int64_t first = static_cast<int64_t>(seen & kItemMask);
        if (first >= job.count) return;
        const int64_t last = first + job.grain < job.count ? first + job.grain : job.count;
        const uint64_t next = (generation << kItemBits) | static_cast<uint64_t>(last);
        if (!pool->ticket.compare_exchange_weak(seen, next, std::memory_order_acq_rel)) continue;
        job.fn(job.context, first, last, thread, pool->scratch[thread]);
        pool->done.fetch_add(last - first, std::memory_order_acq_rel);
        seen = pool->ticket.load(std::memory_order_acquire);
    }
}

bool is_open(uint64_t generation, uint64_t last) { return generation != last && generation % 2 == 0; }

uint64_t wait_for_job(uint64_t last) {
    for (int spins = 0;; spins++) {
        const uint64_t generation = pool->ticket.load(std::memory_order_acquire) >> kItemBits;
        if (is_open(generation, last) || pool->stop.load(std::memory_order_relaxed)) return generation;
        if (spins < kSpins) {
            _mm_pause();
            continue;
        }
        if (pool->in_region.load(std::memory_order_relaxed) && spins < 100 * kSpins) {
            if (spins % 64 == 0) std::this_thread::yield();  // another process may want this core
            _mm_pause();
            continue;
        }
        std::unique_lock<std::mutex> lock(pool->mutex);
        pool->sleepers.fetch_add(1);
        pool->wake.wait(lock, [&] {
            return is_open(pool->ticket.load() >> kItemBits, last) || pool->stop.load();
        });
        pool->sleepers.fetch_sub(1);
        spins = 0;
    }
}

void worker(int thread) {
    _mm_setcsr(_mm_getcsr() | kFlushDenormals);
    uint64_t last = 0;
    while (!pool->stop.load()) {
        const uint64_t generation = wait_for_job(last);
        if (pool->stop.load()) return;
        // The job may be read only while its generation stands: `readers` keeps the caller from replacing it.
        pool->readers.fetch_add(1);
        if (pool->ticket.load() >> kItemBits == generation) {
            const Job job = pool->job;
            work(generation, job, thread);
        }
        pool->readers.fetch_sub(1);
        last = generation;
    }
}

void stop_pool() {
    if (!pool) return;
    {
        std::lock_guard<std::mutex> lock(pool->mutex);
        pool->stop = true;
    }
    pool->wake.notify_all();
    for (auto &thread : pool->workers) thread.join();
    for (void *memory : pool->scratch) std::free(memory);
    delete pool;
    pool = nullptr;
}

void start_pool() {
    if (wanted < 1) wanted = 1;
    pool = new Pool;
    for (int i = 0; i < wanted; i++) pool->scratch.push_back(std::aligned_alloc(64, kScratchBytes));
    for (int i = 1; i < wanted; i++) pool->workers.emplace_back(worker, i);
}

}  // namespace

int num_threads() { return wanted < 1 ? 1 : wanted; }

void parallel_for(int64_t count, int64_t grain, PieceFn fn, void *context) {
    if (!pool) start_pool();
    if (count <= 0) return;
    const unsigned csr = _mm_getcsr();
    _mm_setcsr(csr | kFlushDenormals);
    if (count <= grain || pool->workers.empty()) {
        fn(context, 0, count, 0, pool->scratch[0]);
    } else {
        const uint64_t closed = (pool->ticket.load() >> kItemBits) + 1;
        pool->ticket.store(closed << kItemBits | kItemMask);
        while (pool->readers.load() != 0) _mm_pause();  // late workers are still looking at the last job
        pool->job = Job{fn, context, count, grain};
        pool->done.store(0);
        const uint64_t generation = closed + 1;
        pool->ticket.store(generation << kItemBits);
        if (pool->sleepers.load() > 0) {
            { std::lock_guard<std::mutex> lock(pool->mutex); }
            pool->wake.notify_all();
        }
        work(generation, pool->job, 0);
        while (pool->done.load(std::memory_order_acquire) != count) _mm_pause();
    }
    _mm_setcsr(csr);
}

void begin_region() {
    if (!pool) start_pool();
    pool->in_region.store(true);
}

void end_region() { pool->in_region.store(false); }

KQ_API void kq_set_threads(int32_t threads) {
    if (pool && threads == wanted) return;
    stop_pool();
    wanted = threads;
}

KQ_API int32_t kq_threads(void) { return num_threads(); }
