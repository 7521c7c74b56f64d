#include "kernels.h"

#if defined(__AMX_INT8__)
#include "isa.inc"
#include "attention_amx.h"
#include "linear_amx.h"

namespace {
/* The kernels of avx512, and those that the matrix unit does better. */
constexpr Kernels with_tiles(Kernels kernels) {
    kernels.linear = linear_amx;
    kernels.attend = attend_amx;
    kernels.round = round_amx;
    kernels.round_from = kTileRows;
    return kernels;
}
}  // namespace

const Kernels *kernels_amx() {
    static constexpr Kernels kernels = with_tiles(table("amx"));
    return &kernels;
}
#else
const Kernels *kernels_amx() { return nullptr; }
#endif
