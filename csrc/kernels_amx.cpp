#include "isa.inc"

const Kernels *kernels_amx() {
    static constexpr Kernels kernels = table("amx");
    return &kernels;
}
