#include "kernels.h"

#if defined(__AVXVNNI__)
#include "isa.inc"

const Kernels *kernels_avxvnni() {
    static constexpr Kernels kernels = table("avxvnni");
    return &kernels;
}
#else
const Kernels *kernels_avxvnni() { return nullptr; }
#endif
