#include "kernels.h"

#if defined(__AVX512VNNI__)
#include "isa.inc"

const Kernels *kernels_avx512() {
    static constexpr Kernels kernels = table("avx512");
    return &kernels;
}
#else
const Kernels *kernels_avx512() { return nullptr; }
#endif
