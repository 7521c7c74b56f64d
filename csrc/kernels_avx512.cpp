#include "isa.inc"

const Kernels *kernels_avx512() {
    static constexpr Kernels kernels = table("avx512");
    return &kernels;
}
