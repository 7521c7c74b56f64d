/* The only file with intrinsics of AVX2 and AVX-512: 16 lanes of fp32 or int32 under one set of names.
 *
 * A file that includes this is compiled for one instruction set; everything here has internal linkage, so that the
 * linker can never give one set's code to another. AVX2 carries 16 lanes in two registers. */
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

#if defined(__AVX512F__)

struct F { __m512 v; };  // 16 fp32
struct I { __m512i v; }; // 16 int32, or 64 bytes

inline F f_zero() { return {_mm512_setzero_ps()}; }
inline F f_set(float x) { return {_mm512_set1_ps(x)}; }
inline F f_load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline void f_store(float *p, F a) { _mm512_storeu_ps(p, a.v); }
inline F f_load_some(const float *p, int64_t n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
inline void f_store_some(float *p, F a, int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F f_div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F f_fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline F f_max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F f_abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline float f_sum(F a) { return _mm512_reduce_add_ps(a.v); }
inline float f_largest(F a) { return _mm512_reduce_max_ps(a.v); }
inline F f_from_i(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I i_from_f(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // half to even
inline F f_load_f16(const uint16_t *p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
}
inline F f_load_bf16(const uint16_t *p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16))};
}
inline F f_load_i8(const int8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
}
inline F f_load_u8(const uint8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
}

inline I i_zero() { return {_mm512_setzero_si512()}; }
inline I i_set(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I i_load(const void *p) { return {_mm512_loadu_si512(p)}; }
inline void i_store(void *p, I a) { _mm512_storeu_si512(p, a.v); }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I i_shift_right(I a, int n) { return {_mm512_srli_epi32(a.v, static_cast<unsigned>(n))}; }
inline F f_bf16_low(I a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline F f_bf16_high(I a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
/* acc + the dot products of four unsigned bytes of u and four signed bytes of s, lane by lane. */
inline I i_dot_u8s8(I acc, I u, I s) { return {_mm512_dpbusd_epi32(acc.v, u.v, s.v)}; }
/* Both halves of eight inputs: acc + lo . x_lo + hi . x_hi, where lo and hi are 0..15. */
inline I i_dot_nibbles(I acc, I lo, I hi, I x_lo, I x_hi) { return i_dot_u8s8(i_dot_u8s8(acc, lo, x_lo), hi, x_hi); }
/* A vector of int8 weights kept as code + 128, ready to be multiplied by many rows. */
struct W { I u; };
constexpr bool kDotsAreSigned = false;  // i_dot_weights gives dot(code + 128, x), and 128 * sum(x) is to be subtracted
inline W w_load(const void *p) { return {i_load(p)}; }
inline I i_dot_weights(I acc, W w, I x) { return i_dot_u8s8(acc, w.u, x); }
inline I i_bits(F a) { return {_mm512_castps_si512(a.v)}; }
inline F f_from_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
inline I i_max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline I i_shift_left(I a, int n) { return {_mm512_slli_epi32(a.v, static_cast<unsigned>(n))}; }
inline int32_t i_sum(I a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t i_largest(I a) { return _mm512_reduce_max_epi32(a.v); }
/* Sums of the products of pairs of int16. */
inline I i_pairs(I a, I b) { return {_mm512_madd_epi16(a.v, b.v)}; }
inline I i_load_u8(const uint8_t *p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
}
inline void i_store_i8(int8_t *p, I a) {  // saturates
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtsepi32_epi8(a.v));
}
inline F f_gather(const float *base, const int32_t *at) { return {_mm512_i32gather_ps(i_load(at).v, base, 4)}; }
inline F f_min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }

#else  // AVX2

struct F { __m256 a, b; };
struct I { __m256i a, b; };

inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F f_load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float *p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline F f_load_some(const float *p, int64_t n) {
    float all[16] = {};
    for (int64_t i = 0; i < n; i++) all[i] = p[i];
    return f_load(all);
}
inline void f_store_some(float *p, F x, int64_t n) {
    float all[16];
    f_store(all, x);
    for (int64_t i = 0; i < n; i++) p[i] = all[i];
}
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F f_div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F f_abs(F x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline float f_sum(F x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float f_largest(F x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline F f_from_i(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I i_from_f(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F f_load_f16(const uint16_t *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 8)))};
}
inline __m256 widen_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16));
}
inline F f_load_bf16(const uint16_t *p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline F f_load_i8(const int8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8))))};
}
inline F f_load_u8(const uint8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8))))};
}

inline I i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I i_load(const void *p) {
    const auto *q = static_cast<const __m256i *>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void i_store(void *p, I x) {
    auto *q = static_cast<__m256i *>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
}
inline I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I operator&(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I i_shift_right(I x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
inline F f_bf16_low(I x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
inline F f_bf16_high(I x) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(x.a, mask)), _mm256_castsi256_ps(_mm256_and_si256(x.b, mask))};
}
inline __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
    // vpmaddubsw saturates at 16 bits, so bytes are multiplied as 16-bit numbers, even and odd ones apart.
    const __m256i low = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
}
inline I i_dot_u8s8(I acc, I u, I s) { return {dot_half(acc.a, u.a, s.a), dot_half(acc.b, u.b, s.b)}; }
inline __m256i nibbles_half(__m256i acc, __m256i lo, __m256i hi, __m256i x_lo, __m256i x_hi) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(acc, lo, x_lo), hi, x_hi);
#else
    // Four products of at most 15 * 127 fit 16 bits.
    const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(lo, x_lo), _mm256_maddubs_epi16(hi, x_hi));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
#endif
}
/* Both halves of eight inputs: acc + lo . x_lo + hi . x_hi, where lo and hi are 0..15. */
inline I i_dot_nibbles(I acc, I lo, I hi, I x_lo, I x_hi) {
    return {nibbles_half(acc.a, lo.a, hi.a, x_lo.a, x_hi.a), nibbles_half(acc.b, lo.b, hi.b, x_lo.b, x_hi.b)};
}
#if defined(__AVXVNNI__)
struct W { I u; };
constexpr bool kDotsAreSigned = false;
inline W w_load(const void *p) { return {i_load(p)}; }
inline I i_dot_weights(I acc, W w, I x) { return i_dot_u8s8(acc, w.u, x); }
#else
/* A vector of int8 weights kept as code + 128, ready to be multiplied by many rows: its codes and their sizes.
 * |code| * (x with the sign of code) has pairs of at most 2 * 127 * 127, which fit 16 bits. */
struct W { I code, size; };
constexpr bool kDotsAreSigned = true;  // i_dot_weights gives dot(code, x)
inline W w_load(const void *p) {
    const I u = i_load(p);
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(-128));
    const I code = {_mm256_xor_si256(u.a, flip), _mm256_xor_si256(u.b, flip)};
    return {code, {_mm256_abs_epi8(code.a), _mm256_abs_epi8(code.b)}};
}
inline __m256i weights_half(__m256i acc, __m256i code, __m256i size, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, code));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I i_dot_weights(I acc, W w, I x) {
    return {weights_half(acc.a, w.code.a, w.size.a, x.a), weights_half(acc.b, w.code.b, w.size.b, x.b)};
}
#endif
inline I i_bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline F f_from_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I i_max(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline I i_shift_left(I x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
inline int32_t i_sum(I x) {
    const __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
inline int32_t i_largest(I x) {
    const __m256i s = _mm256_max_epi32(x.a, x.b);
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
inline I i_pairs(I x, I y) { return {_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(x.b, y.b)}; }
inline I i_load_u8(const uint8_t *p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8)))};
}
inline void i_store_i8(int8_t *p, I x) {  // saturates
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline F f_gather(const float *base, const int32_t *at) {
    const I i = i_load(at);
    return {_mm256_i32gather_ps(base, i.a, 4), _mm256_i32gather_ps(base, i.b, 4)};
}
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }

#endif

/* The same four bytes in all lanes. */
inline I i_four(const int8_t *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return i_set(four);
}

}  // namespace
