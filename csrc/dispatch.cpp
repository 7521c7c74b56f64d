/* Which instruction set runs, chosen once by cpuid and changed only by kq_choose. */
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "kernels.h"

namespace {

struct Leaf { unsigned a, b, c, d; };

Leaf cpu(unsigned leaf, unsigned subleaf) {
    Leaf r{};
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
    return r;
}

/* Which register files the operating system saves: bits of XCR0. */
unsigned long long saved_states() {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<unsigned long long>(high) << 32) | low;
}

bool os_saves(unsigned long long bits) {
    const bool has_xgetbv = cpu(1, 0).c & (1u << 27);
    return has_xgetbv && (saved_states() & bits) == bits;
}

bool has_avx2() {
    const unsigned fma = 1u << 12, f16c = 1u << 29, avx2 = 1u << 5, bmi2 = 1u << 8;  // what setup.py lets gcc use
    const unsigned c = cpu(1, 0).c, b = cpu(7, 0).b;
    return (c & fma) && (c & f16c) && (b & avx2) && (b & bmi2) && os_saves(0x6);
}

bool has_avx512() {
    const unsigned b = cpu(7, 0).b, c = cpu(7, 0).c;
    const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
    return has_avx2() && (b & f) && (b & dq) && (b & bw) && (b & vl) && (c & vnni) && os_saves(0xe6);
}

bool has_avxvnni() { return has_avx2() && (cpu(7, 1).a & (1u << 4)); }

constexpr int kTileData = 18;  // XFEATURE_XTILEDATA, which Linux hands out on request only

bool has_amx() {
    const unsigned d = cpu(7, 0).d, tile = 1u << 24, int8 = 1u << 25, bf16 = 1u << 22;
    if (!has_avx512() || !(cpu(7, 1).a & (1u << 5)) || !(d & tile) || !(d & int8) || !(d & bf16)) return false;
    unsigned long long on_offer = 0;
    constexpr int kGetSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
    return os_saves(0x60000) && syscall(SYS_arch_prctl, kGetSupported, &on_offer) == 0 && (on_offer >> kTileData & 1);
}

bool ask_for_tiles() {
    constexpr int kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM: for the whole process, its later threads included
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

bool needs_nothing() { return true; }

/* Best first. A file whose instructions the compiler did not know gives no kernels. */
struct Choice {
    const char *name;
    const Kernels *(*kernels)();
    bool (*has)();
    bool (*prepare)();
};
constexpr Choice kChoices[] = {
    {"amx", kernels_amx, has_amx, ask_for_tiles},
    {"avx512", kernels_avx512, has_avx512, needs_nothing},
    {"avxvnni", kernels_avxvnni, has_avxvnni, needs_nothing},
    {"avx2", kernels_avx2, has_avx2, needs_nothing},
};

bool can_run(const Choice &choice) { return choice.kernels() != nullptr && choice.has(); }

std::atomic<const Kernels *> active{nullptr};

}  // namespace

const Kernels *active_kernels() {
    const Kernels *found = active.load(std::memory_order_relaxed);
    if (found) return found;
    for (const Choice &choice : kChoices) {
        if (!can_run(choice) || !choice.prepare()) continue;
        active.store(choice.kernels(), std::memory_order_relaxed);
        return choice.kernels();
    }
    return nullptr;
}

KQ_API int32_t kq_version(void) { return KQ_VERSION; }

KQ_API const char *kq_backend(void) { return active_kernels() ? active_kernels()->name : ""; }

KQ_API int32_t kq_supports(const char *backend) {
    for (const Choice &choice : kChoices)
        if (!std::strcmp(backend, choice.name)) return can_run(choice);
    return 0;
}

KQ_API int32_t kq_choose(const char *backend) {
    for (const Choice &choice : kChoices) {
        if (std::strcmp(backend, choice.name) || !can_run(choice) || !choice.prepare()) continue;
        active.store(choice.kernels(), std::memory_order_relaxed);
        return 0;
    }
    return -1;
}
