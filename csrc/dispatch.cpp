/* Which instruction set runs, chosen once by cpuid and changed only by kq_choose. */
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace {

const Kernels *active = nullptr;

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
    const bool fma = cpu(1, 0).c & (1u << 12), f16c = cpu(1, 0).c & (1u << 29);
    return fma && f16c && (cpu(7, 0).b & (1u << 5)) && os_saves(0x6);
}

bool has_avx512() {
    const unsigned b = cpu(7, 0).b, c = cpu(7, 0).c;
    const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
    return has_avx2() && (b & f) && (b & dq) && (b & bw) && (b & vl) && (c & vnni) && os_saves(0xe6);
}

bool has_amx() {
    const unsigned d = cpu(7, 0).d, tile = 1u << 24, int8 = 1u << 25, bf16 = 1u << 22;
    if (!has_avx512() || !(cpu(7, 1).a & (1u << 5)) || !(d & tile) || !(d & int8) || !(d & bf16)) return false;
    // Linux hands the tile registers out on request only: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
    return os_saves(0x60000) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

const Kernels *find(const char *name) {
    if (!std::strcmp(name, "amx") && has_amx()) return kernels_amx();
    if (!std::strcmp(name, "avx512") && has_avx512()) return kernels_avx512();
    if (!std::strcmp(name, "avx2") && has_avx2()) return kernels_avx2();
    return nullptr;
}

}  // namespace

const Kernels *active_kernels() {
    if (!active) {
        for (const char *name : {"amx", "avx512", "avx2"})
            if (!active) active = find(name);
    }
    return active;
}

KQ_API int32_t kq_version(void) { return KQ_VERSION; }

KQ_API const char *kq_backend(void) { return active_kernels() ? active_kernels()->name : ""; }

KQ_API int32_t kq_supports(const char *backend) { return find(backend) != nullptr; }

KQ_API int32_t kq_choose(const char *backend) {
    const Kernels *found = find(backend);
    if (!found) return -1;
    active = found;
    return 0;
}
