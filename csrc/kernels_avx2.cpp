#include "isa.inc"

const Kernels *kernels_avx2() {
    static constexpr Kernels kernels = table("avx2");
    return &kernels;
}
