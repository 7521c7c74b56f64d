#include "threads.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdlib>

#include "kernels.h"

namespace {

constexpr int64_t kIdleSpin = 50'000;        // ns outside a region; longer than the gap between two calls of an op
constexpr int64_t kGreedySpin = 20'000;      // ns; whoever waits longer offers its core to other processes
constexpr int64_t kRegionSpin = 5'000'000;   // ns within a region: then the caller itself was taken away
constexpr int kPauses = 32;                  // between two looks at the clock
constexpr unsigned kFlushDenormals = 0x8040; // MXCSR: flush to zero, denormals are zero
constexpr int kMostThreads = 1024;
constexpr int64_t kClosed = 0xffffffff;      // an item that no job has: the next job is being written

struct Pool;

struct Worker {
    pthread_t handle;
    Pool *pool;
    int thread;
};

struct Pool {
    /* Generation of the job << 32 | next item, in one word: whoever takes a piece takes it of the generation it has
     * read. A worker may read the fields of the next job by mistake, but then its exchange fails (run_together). */
    alignas(64) std::atomic<uint64_t> ticket{0};
    alignas(64) std::atomic<PieceFn> fn{nullptr};
    std::atomic<void *> context{nullptr};
    std::atomic<int64_t> count{0}, grain{1};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<uint32_t> alarm{0};  // sleepers sleep until it changes
    std::atomic<int> sleepers{0};
    std::atomic<bool> in_region{false};
    std::atomic<bool> stop{false};
    int num_threads = 1;
    Worker workers[kMostThreads];
    void *scratch[kMostThreads];
};

pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;  // held by the one caller that computes; guards all below
Pool *pool = nullptr;
std::atomic<int> wanted{1};
bool knows_fork = false;
unsigned callers_csr = 0;
thread_local int depth = 0;  // of regions that this caller is in

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

void futex(std::atomic<uint32_t> *word, int operation, uint32_t value) {
    static_assert(sizeof(*word) == sizeof(uint32_t), "the kernel waits on a plain word");
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(word), operation, value, nullptr, nullptr, 0);
}

uint32_t generation_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

/* Take pieces of a generation until none are left. */
void work(Pool *p, uint32_t generation, int thread) {
    int64_t finished = 0;
    uint64_t seen = p->ticket.load(std::memory_order_acquire);
    while (generation_of(seen) == generation) {
        const int64_t count = p->count.load(std::memory_order_acquire);
        const int64_t grain = p->grain.load(std::memory_order_acquire);
        const PieceFn fn = p->fn.load(std::memory_order_acquire);
        void *context = p->context.load(std::memory_order_acquire);
        const int64_t first = static_cast<int64_t>(seen & 0xffffffffu);
        if (first == kClosed || first >= count) break;
        const int64_t some = grain != kShrinking ? grain : 1 + (count - first) / (2 * p->num_threads);
        const int64_t last = first + some < count ? first + some : count;
        const uint64_t next = static_cast<uint64_t>(generation) << 32 | static_cast<uint64_t>(last);
        if (!p->ticket.compare_exchange_weak(seen, next, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        fn(context, first, last, thread, p->scratch[thread]);
        finished += last - first;
        seen = p->ticket.load(std::memory_order_acquire);
    }
    if (finished) p->done.fetch_add(finished, std::memory_order_release);
}

bool has_news(Pool *p, uint32_t last) {
    return generation_of(p->ticket.load(std::memory_order_seq_cst)) != last || p->stop.load(std::memory_order_seq_cst);
}

void sleep_until_news(Pool *p, uint32_t last) {
    const uint32_t alarm = p->alarm.load(std::memory_order_seq_cst);
    // Either the caller sees this sleeper and rings, or the sleeper sees the caller's job here.
    p->sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (!has_news(p, last)) futex(&p->alarm, FUTEX_WAIT_PRIVATE, alarm);
    p->sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void wake(Pool *p, int count) {
    if (p->sleepers.load(std::memory_order_seq_cst) == 0) return;
    p->alarm.fetch_add(1, std::memory_order_seq_cst);
    futex(&p->alarm, FUTEX_WAKE_PRIVATE, static_cast<uint32_t>(count));
}

void wait_for_news(Pool *p, uint32_t last) {
    int64_t begin = now();
    for (;;) {
        for (int i = 0; i < kPauses; i++) {
            if (has_news(p, last)) return;
            _mm_pause();
        }
        const int64_t waited = now() - begin;
        const bool in_region = p->in_region.load(std::memory_order_relaxed);
        if (waited > (in_region ? kRegionSpin : kIdleSpin)) {
            sleep_until_news(p, last);
            begin = now();
        } else if (waited > kGreedySpin) {
            sched_yield();
        }
    }
}

void *run_worker(void *argument) {
    Pool *p = static_cast<Worker *>(argument)->pool;
    const int thread = static_cast<Worker *>(argument)->thread;
    _mm_setcsr(_mm_getcsr() | kFlushDenormals);
    uint32_t last = 0;
    for (;;) {
        wait_for_news(p, last);
        if (p->stop.load(std::memory_order_seq_cst)) return nullptr;
        last = generation_of(p->ticket.load(std::memory_order_acquire));
        work(p, last, thread);
    }
}

void stop_pool() {
    if (!pool) return;
    pool->stop.store(true, std::memory_order_seq_cst);
    wake(pool, INT_MAX);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->workers[i].handle, nullptr);
    for (int i = 0; i < pool->num_threads; i++) std::free(pool->scratch[i]);
    delete pool;
    pool = nullptr;
}

/* A fork while another thread computes would copy a pool in the middle of a job: it waits for its turn instead. The
 * child has no workers, so it forgets the pool, memory and all. */
void before_fork() { if (depth == 0) pthread_mutex_lock(&turn); }
void after_fork() { if (depth == 0) pthread_mutex_unlock(&turn); }
void after_fork_in_child() {
    pool = nullptr;
    after_fork();
}

bool start_worker(Pool *p, int thread) {
    Worker *worker = &p->workers[thread];
    worker->pool = p;
    worker->thread = thread;
    return pthread_create(&worker->handle, nullptr, run_worker, worker) == 0;
}

void start_pool() {
    if (!knows_fork) pthread_atfork(before_fork, after_fork, after_fork_in_child);
    knows_fork = true;
    Pool *p = new Pool;
    // Signals are for the program's own threads: a worker would only run their handlers late.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int threads = wanted.load();
    for (int i = 0; i < threads; i++) {
        p->scratch[i] = std::aligned_alloc(64, kScratchBytes);  // its pages come when their thread touches them
        if (!p->scratch[i] && i == 0) std::abort();
        if (!p->scratch[i] || (i > 0 && !start_worker(p, i))) {
            std::free(p->scratch[i]);
            break;  // a process that may have no more threads computes with those it got
        }
        p->num_threads = i + 1;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pool = p;
}

void enter() {
    if (depth++ > 0) return;
    pthread_mutex_lock(&turn);
    if (!pool) start_pool();
    callers_csr = _mm_getcsr();
    _mm_setcsr(callers_csr | kFlushDenormals);
}

void leave() {
    if (--depth > 0) return;
    _mm_setcsr(callers_csr);
    pthread_mutex_unlock(&turn);
}

void run_alone(int64_t count, int64_t grain, PieceFn fn, void *context) {
    if (grain == kShrinking) grain = count;
    for (int64_t first = 0; first < count; first += grain)
        fn(context, first, first + grain < count ? first + grain : count, 0, pool->scratch[0]);
}

void run_together(Pool *p, int64_t count, int64_t grain, PieceFn fn, void *context) {
    // First the ticket is closed, under a generation of its own: a late worker that reads the fields below as they
    // change (acquire, release) must then find that its exchange fails. A new count beside the old ticket would let it.
    const uint64_t closed = (p->ticket.load(std::memory_order_relaxed) >> 32) + 1;
    p->ticket.store(closed << 32 | kClosed, std::memory_order_seq_cst);
    p->fn.store(fn, std::memory_order_release);
    p->context.store(context, std::memory_order_release);
    p->count.store(count, std::memory_order_release);
    p->grain.store(grain, std::memory_order_release);
    p->done.store(0, std::memory_order_relaxed);
    const uint32_t generation = static_cast<uint32_t>(closed + 1);
    p->ticket.store(static_cast<uint64_t>(generation) << 32, std::memory_order_seq_cst);
    // The first piece is the caller's own.
    const int64_t others = grain != kShrinking ? (count + grain - 1) / grain - 1 : count - 1;
    wake(p, static_cast<int>(others < INT_MAX ? others : INT_MAX));
    work(p, generation, 0);
    for (int64_t spins = 1; p->done.load(std::memory_order_acquire) != count; spins++) {
        _mm_pause();
        if (spins % 512 == 0) sched_yield();  // another process holds the core of a worker: it may have this one
    }
}

}  // namespace

int num_threads() { return wanted.load(); }

void *caller_scratch() { return pool->scratch[0]; }

void parallel_for(int64_t count, int64_t grain, PieceFn fn, void *context) {
    if (count <= 0) return;
    if (grain < 1 && grain != kShrinking) grain = 1;
    enter();
    if (count <= grain || pool->num_threads == 1) run_alone(count, grain, fn, context);
    else run_together(pool, count, grain, fn, context);
    leave();
}

void begin_region() {
    enter();
    if (depth > 1) return;
    pool->in_region.store(true, std::memory_order_relaxed);
    wake(pool, INT_MAX);
}

void end_region() {
    if (depth == 1) pool->in_region.store(false, std::memory_order_relaxed);
    leave();
}

KQ_API void kq_set_threads(int32_t threads) {
    if (threads < 1) threads = 1;
    if (threads > kMostThreads) threads = kMostThreads;
    pthread_mutex_lock(&turn);
    if (threads != wanted.load()) stop_pool();
    wanted.store(threads);
    pthread_mutex_unlock(&turn);
}

KQ_API int32_t kq_threads(void) { return num_threads(); }

namespace {
void visit(void *context, int64_t first, int64_t last, int, void *) {
    for (int64_t i = first; i < last; i++) static_cast<int32_t *>(context)[i]++;
}
}  // namespace

KQ_API void kq_visit(int64_t count, int64_t grain, int32_t *visits) { parallel_for(count, grain, visit, visits); }
