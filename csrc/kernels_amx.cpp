#include "kernels.h"

#if defined(__AMX_INT8__)
#include "isa.inc"

const Kernels *kernels_amx() {
    static constexpr Kernels kernels = table("amx");
    return &kernels;
}
#else
const Kernels *kernels_amx() { return nullptr; }
#endif
