/* The matrix unit (AMX): tile registers of 16 rows of 64 bytes. The only file with its instructions, and with those
 * of AVX-512 that only its kernels need.
 *
 * Written as assembly because the compiler's own intrinsics do not say that they read and write memory, so that
 * stores may move past the tile load that needs them. Tile numbers are literals: the registers 0..7. */
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "simd.h"

namespace {

/* Which part of each tile register is used: rows, and bytes in a row. The operand of ldtilecfg. */
struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

inline void tile_config(const TileConfig *config) {
    __asm__ volatile("ldtilecfg %0" ::"m"(*config));
}
inline void tile_release() { __asm__ volatile("tilerelease" ::); }

#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::)
/* Rows of tile t from p, p + stride, ... */
#define TILE_LOAD(t, p, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_STORE(t, p, stride) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"(static_cast<int64_t>(stride)) : "memory")
/* c[i][j] += sum over 4 bytes of 16 quads a[i][quad] * b[quad][j], exact in int32. */
#define TILE_DOT_S8U8(c, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define TILE_DOT_S8S8(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
/* The same of pairs of bf16, summed in fp32; denormals are zero. */
#define TILE_DOT_BF16(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

/* Call for a line of memory as far as the second cache. */
inline void fetch_second(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1); }

/* 16 pairs of bf16, first[i] and second[i] side by side. */
inline void store_bf16_pairs(uint16_t *p, F first, F second) {
    const __m512bh halves = _mm512_cvtne2ps_pbh(second.v, first.v);
    __m512i words, order = _mm512_set1_epi32(16 << 16);
    __builtin_memcpy(&words, &halves, sizeof words);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    order = _mm512_add_epi32(order, _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x00010001)));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, words));
}

/* 64 bytes. */
inline I i_sub_bytes(I a, I b) { return {_mm512_sub_epi8(a.v, b.v)}; }
/* 16 bytes, each four times. */
inline I i_spread_bytes(const uint8_t *p) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return {_mm512_mullo_epi32(wide, _mm512_set1_epi32(0x01010101))};
}
/* 32 fp32 to bf16, half to even; denormals to zero. */
inline void store_bf16(uint16_t *p, F low, F high) {
    const __m512bh halves = _mm512_cvtne2ps_pbh(high.v, low.v);
    __builtin_memcpy(p, &halves, sizeof halves);
}

}  // namespace
