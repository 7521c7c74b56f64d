#include "kernels.h"

#if defined(__AVX2__)
#include "isa.inc"

const Kernels *kernels_avx2() {
    static constexpr Kernels kernels = table("avx2");
    return &kernels;
}
#else
const Kernels *kernels_avx2() { return nullptr; }
#endif
