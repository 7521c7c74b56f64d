/* The only file with intrinsics of AVX2 and AVX-512: 16 lanes of fp32 or int32 under one set of names.
 *
 * A file that includes this is compiled for one instruction set; everything here has internal linkage, so that the
 * linker can never give one set's code to another. AVX2 carries 16 lanes in two registers. */
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

// exp(x) = 2^n exp(r), n = round(x / ln 2); the polynomial is that of Cephes' expf.
constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kExpLowest = -87.3f;
constexpr float kExp[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

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
inline F f_min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
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
/* acc + the dot products of four unsigned bytes of u and four signed bytes of s, lane by lane. As assembly: gcc 12
 * gives the intrinsic's result another type than its operand, and copies every accumulator to and fro. */
inline I i_dot_u8s8(I acc, I u, I s) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u.v), "v"(s.v));
    return acc;
}
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

/* exp, about one unit in the last place; 0 below -87.3. */
inline F f_exp(F x) {
    const __m512 in = _mm512_min_ps(x.v, _mm512_set1_ps(88.7f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(in, _mm512_set1_ps(kLog2E)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), in);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), r);
    __m512 p = _mm512_set1_ps(kExp[0]);
    for (int i = 1; i < 6; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp[i]));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    const __mmask16 keep = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(kExpLowest), _CMP_GE_OQ);
    return {_mm512_maskz_scalef_ps(keep, p, n)};
}
inline F f_load_bf16_8(const uint16_t *p) {  // the upper eight lanes are 0
    const __m256i wide = _mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16);
    return {_mm512_castsi512_ps(_mm512_zextsi256_si512(wide))};
}
inline F f_load_i8_8(const int8_t *p) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
    return {_mm512_cvtepi32_ps(_mm512_zextsi256_si512(wide))};
}
inline void f_store_bf16(uint16_t *p, F a) {  // half to even; no NaN
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
/* 32 bytes as 32 signed 16-bit numbers, and the first n of them, the rest 0. */
inline I i_load_i8_i16(const int8_t *p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
}
inline I i_load_i8_i16_some(const int8_t *p, int64_t n) {
    return {_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>((1ull << n) - 1), p))};
}
/* acc + the dot products of pairs of 16-bit numbers, lane by lane. */
inline I i_dot_s16(I acc, I a, I b) { return {_mm512_dpwssd_epi32(acc.v, a.v, b.v)}; }

inline void transpose_16(__m512 *r) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
/* out[j * step + i] = rows[i][j]: the transposed 16 x 16. */
inline void f_store_transposed(float *out, int64_t step, const F *rows) {
    __m512 r[16];
    for (int i = 0; i < 16; i++) r[i] = rows[i].v;
    transpose_16(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_ps(out + i * step, r[i]);
}
/* Lane i: the sum of the lanes of rows[i]. */
inline F f_sums(const F *rows) {
    __m512 r[16];
    for (int i = 0; i < 16; i++) r[i] = rows[i].v;
    for (int i = 0; i < 12; i++) {  // 128-bit lanes: row i twice, row i + 4 twice
        if (i >= 4 && i < 8) continue;
        r[i] = _mm512_add_ps(_mm512_shuffle_f32x4(r[i], r[i + 4], 0x44), _mm512_shuffle_f32x4(r[i], r[i + 4], 0xee));
    }
    for (int i = 0; i < 4; i++)  // rows i, i + 4, i + 8, i + 12
        r[i] = _mm512_add_ps(_mm512_shuffle_f32x4(r[i], r[i + 8], 0x88), _mm512_shuffle_f32x4(r[i], r[i + 8], 0xdd));
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)))};
}

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
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
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
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(s));
    return acc;
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
    return dot_half(dot_half(acc, lo, x_lo), hi, x_hi);
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

inline __m256 exp_half(__m256 x) {
    const __m256 in = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(88.3f)), _mm256_set1_ps(kExpLowest));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(in, _mm256_set1_ps(kLog2E)), 8);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), in);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), r);
    __m256 p = _mm256_set1_ps(kExp[0]);
    for (int i = 1; i < 6; i++) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExp[i]));
    p = _mm256_fmadd_ps(_mm256_mul_ps(p, r), r, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(power)),
                         _mm256_cmp_ps(x, _mm256_set1_ps(kExpLowest), _CMP_GE_OQ));
}
/* exp, about one unit in the last place; 0 below -87.3. */
inline F f_exp(F x) { return {exp_half(x.a), exp_half(x.b)}; }
inline F f_load_bf16_8(const uint16_t *p) { return {widen_bf16(p), _mm256_setzero_ps()}; }
inline F f_load_i8_8(const int8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)))),
            _mm256_setzero_ps()};
}
inline __m256i round_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
}
inline void f_store_bf16(uint16_t *p, F x) {  // half to even; no NaN
    const __m256i both = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_permute4x64_epi64(both, 0xd8));
}
/* 32 bytes as 32 signed 16-bit numbers, and the first n of them, the rest 0. */
inline I i_load_i8_i16(const int8_t *p) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 16)))};
}
inline I i_load_i8_i16_some(const int8_t *p, int64_t n) {
    int8_t all[32] = {};
    for (int64_t i = 0; i < n; i++) all[i] = p[i];
    return i_load_i8_i16(all);
}
/* acc + the dot products of pairs of 16-bit numbers, lane by lane. */
inline I i_dot_s16(I acc, I x, I y) {
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, y.b))};
}
inline void transpose_8(__m256 *r) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    __m256 u[8];
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
/* out[j * step + i] = rows[i][j]: the transposed 16 x 16. */
inline void f_store_transposed(float *out, int64_t step, const F *rows) {
    for (int half = 0; half < 2; half++) {
        __m256 r[8];
        for (int i = 0; i < 8; i++) r[i] = rows[8 * half + i].a;
        transpose_8(r);
        for (int i = 0; i < 8; i++) _mm256_storeu_ps(out + i * step + 8 * half, r[i]);
        for (int i = 0; i < 8; i++) r[i] = rows[8 * half + i].b;
        transpose_8(r);
        for (int i = 0; i < 8; i++) _mm256_storeu_ps(out + (8 + i) * step + 8 * half, r[i]);
    }
}
inline __m256 sums_of_8(const F *rows) {
    __m256 r[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_add_ps(rows[i].a, rows[i].b);
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
/* Lane i: the sum of the lanes of rows[i]. */
inline F f_sums(const F *rows) { return {sums_of_8(rows), sums_of_8(rows + 8)}; }

#endif

/* The same four bytes in all lanes. */
inline I i_four(const int8_t *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return i_set(four);
}
/* One number as fp16, half to even, and back. */
inline uint16_t f16_from_float(float x) { return static_cast<uint16_t>(_cvtss_sh(x, 0)); }
inline float float_from_f16(uint16_t x) { return _cvtsh_ss(x); }
inline void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

}  // namespace
