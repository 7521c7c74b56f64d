/* Drives the C interface over odd shapes with every backend of this processor: `make native-check`. */
#include "check.h"

#include <algorithm>
#include <cstdio>
#include <thread>

#include "../threads.h"

namespace {

/* Visits by one caller after another: each item of a job once, whatever the job before was. */
void check_jobs(const char *backend, int threads) {
    constexpr int64_t kCounts[] = {2, 3, 5, 200, 1, 17};
    constexpr int32_t kRounds = 300;
    std::vector<std::vector<int32_t>> visits;
    for (const int64_t count : kCounts) visits.emplace_back(static_cast<size_t>(count));
    for (int32_t round = 0; round < kRounds; round++)
        for (std::vector<int32_t> &found : visits) kq_visit(static_cast<int64_t>(found.size()), 1, found.data());
    for (const std::vector<int32_t> &found : visits)
        for (const int32_t n : found) expect(n == kRounds, "jobs back to back lose or repeat items", backend, threads);
    for (int64_t count = 0; count < 200; count += 7) {
        std::vector<int32_t> found(static_cast<size_t>(count));
        kq_visit(count, count % 4 ? 1 + count % 6 : kShrinking, found.data());
        for (const int32_t n : found) expect(n == 1, "an item is not visited once", backend, threads, count);
    }
}

void check_callers(const char *backend) {
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; i++)
        callers.emplace_back([backend, i] {
            for (int round = 0; round < 100; round++) {
                std::vector<int32_t> found(static_cast<size_t>(50 + 13 * i));
                kq_visit(static_cast<int64_t>(found.size()), 1, found.data());
                for (const int32_t n : found) expect(n == 1, "callers disturb each other", backend);
            }
        });
    for (std::thread &caller : callers) caller.join();
}

}  // namespace

void check_pool(const char *backend) {
    for (const int threads : {1, 2, 5, 3, 8}) {
        kq_set_threads(threads);
        check_jobs(backend, threads);
        check_callers(backend);
    }
    const std::vector<uint64_t> ones((3 << 20) / 8 + 5, 1);
    auto *whole = static_cast<char *>(std::aligned_alloc(64, 3 << 20));
    std::copy_n(reinterpret_cast<const char *>(ones.data()), 3 << 20, whole);
    expect(kq_read(whole, 3 << 20) == (3 << 20) / 8, "memory is not read once", backend);
    std::free(whole);
}

int main() {
    int checked = 0;
    for (const char *backend : {"amx", "avx512", "avxvnni", "avx2"}) {
        if (kq_choose(backend) != 0) continue;
        check_pool(backend);
        kq_set_threads(1);
        check_linear(backend);
        kq_set_threads(3);
        check_linear(backend);
        check_attention(backend);
        check_step(backend);
        check_draw(backend);
        std::printf("%s: sound\n", backend);
        std::fflush(stdout);
        checked++;
    }
    kq_set_threads(1);  // the workers end: what they hold is not lost
    expect(checked > 0, "no backend was checked: this processor has none of them", "check");
}
