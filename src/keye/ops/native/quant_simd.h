// Sixteen lanes for products of quantised weights: a number for each of 16 outputs, whatever the width of a register.
//
// Weights come as lines of 64 bytes: four neighbouring columns of each of 16 outputs. A product adds, for each output,
// four codes times four activations to an int32 sum.
#pragma once
#include "product.h"
#include "rows.h"

namespace keye {

#if defined(KEYE_AVX512)

using F16 = __m512;
using I16 = __m512i;
using Line = __m512i;
constexpr int TILE_ROWS = 6;  // rows of a register tile, beside two lines of outputs

inline F16 fzero() { return _mm512_setzero_ps(); }
inline F16 fset1(float x) { return _mm512_set1_ps(x); }
inline F16 fload(const float *p) { return _mm512_loadu_ps(p); }
inline void fstore(float *p, F16 x) { _mm512_storeu_ps(p, x); }
inline F16 fmul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
inline F16 fadd(F16 a, F16 b) { return _mm512_add_ps(a, b); }
inline F16 fdiv(F16 a, F16 b) { return _mm512_div_ps(a, b); }
inline F16 fmadd(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F16 ffrom_bfloat(const uint16_t *p) { return vfrom_bfloat(p); }
inline F16 ffrom_half(const uint16_t *p) { return vfrom_half(p); }
inline F16 ffrom_int(I16 x) { return _mm512_cvtepi32_ps(x); }
inline float flargest(F16 x) { return _mm512_reduce_max_ps(_mm512_abs_ps(x)); }
inline F16 flarger(F16 a, F16 b) { return _mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)); }
inline float fsum(F16 x) { return _mm512_reduce_add_ps(x); }
inline F16 fexp2(F16 x) { return vexp2(x); }
// a where x is negative, else b.
inline F16 fpick(F16 x, F16 a, F16 b) { return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a); }
inline F16 fmagnitude(F16 x) { return _mm512_abs_ps(x); }
// Rounds to the nearest integer, ties to even; |x| <= 127.
inline void fstore_codes(int8_t *p, F16 x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x))); }

inline I16 iset1(int32_t x) { return _mm512_set1_epi32(x); }
inline I16 izero() { return _mm512_setzero_si512(); }
inline Line lload(const void *p) { return _mm512_loadu_si512(p); }
// The codes in the low and the high halves of bytes.
inline Line llow(Line x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Line lhigh(Line x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
#if !defined(KEYE_VNNI)
inline I16 iadd(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
inline I16 iadd_pairs(I16 a, I16 b) { return _mm512_add_epi16(a, b); }
// Neighbouring int16 added to one int32.
inline I16 iwiden(I16 x) { return _mm512_madd_epi16(x, _mm512_set1_epi16(1)); }
inline I16 pairs_unsigned(Line codes, I16 x) { return _mm512_maddubs_epi16(codes, x); }
inline I16 pairs_signed(Line codes, I16 x) {
    I16 turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), x);
    return _mm512_maddubs_epi16(_mm512_abs_epi8(codes), turned);
}
#endif

#else

struct F16 {
    __m256 a, b;
};
struct I16 {
    __m256i a, b;
};
using Line = I16;
constexpr int TILE_ROWS = 2;

inline F16 fzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 fset1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 fload(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void fstore(float *p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline F16 fmul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 fadd(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 fdiv(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 fmadd(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 ffrom_bfloat(const uint16_t *p) { return {vfrom_bfloat(p), vfrom_bfloat(p + 8)}; }
inline F16 ffrom_half(const uint16_t *p) { return {vfrom_half(p), vfrom_half(p + 8)}; }
inline F16 ffrom_int(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline float flargest(F16 x) { return vlargest(vmax(magnitude(x.a), magnitude(x.b))); }
inline F16 flarger(F16 x, F16 y) { return {vmax(magnitude(x.a), magnitude(y.a)), vmax(magnitude(x.b), magnitude(y.b))}; }
inline float fsum(F16 x) { return vsum(vadd(x.a, x.b)); }
inline F16 fexp2(F16 x) { return {vexp2(x.a), vexp2(x.b)}; }
inline F16 fpick(F16 x, F16 a, F16 b) { return {_mm256_blendv_ps(b.a, a.a, x.a), _mm256_blendv_ps(b.b, a.b, x.b)}; }
inline F16 fmagnitude(F16 x) { return {magnitude(x.a), magnitude(x.b)}; }
inline void fstore_codes(int8_t *p, F16 x) {
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}

inline I16 iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I16 izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Line lload(const void *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
inline Line llow(Line x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Line lhigh(Line x) { return llow({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
#if !defined(KEYE_VNNI)
inline I16 iadd(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I16 iadd_pairs(I16 x, I16 y) { return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}; }
inline I16 iwiden(I16 x) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(x.a, ones), _mm256_madd_epi16(x.b, ones)};
}
inline I16 pairs_unsigned(Line codes, I16 x) {
    return {_mm256_maddubs_epi16(codes.a, x.a), _mm256_maddubs_epi16(codes.b, x.b)};
}
inline I16 pairs_signed(Line codes, I16 x) {
    return {_mm256_maddubs_epi16(_mm256_abs_epi8(codes.a), _mm256_sign_epi8(x.a, codes.a)),
            _mm256_maddubs_epi16(_mm256_abs_epi8(codes.b), _mm256_sign_epi8(x.b, codes.b))};
}
#endif

#endif

#if defined(KEYE_VNNI)

// One instruction multiplies unsigned codes with signed activations and adds four products to an int32. Codes of int8 are
// stored 128 too large for it.
constexpr int INT8_OFFSET = 128;

inline I16 idot(I16 sums, Line codes, I16 x) {
#if defined(KEYE_AVX512)
    return _mm512_dpbusd_epi32(sums, codes, x);
#else
    return {_mm256_dpbusd_avx_epi32(sums.a, codes.a, x.a), _mm256_dpbusd_avx_epi32(sums.b, codes.b, x.b)};
#endif
}

// Sums of up to 32 columns.
template <int BITS> struct Stage {
    I16 sums;
    void begin(I16 so_far) { sums = so_far; }
    void add(Line codes, I16 x) { sums = idot(sums, codes, x); }
    I16 end(I16) const { return sums; }
};

#else

constexpr int INT8_OFFSET = 0;

// Without it, pairs of products are added in int16 first. Those of int4 codes are at most 2 * 15 * 127, so that 8 of them
// stay below 2^15; those of int8 codes at most 2 * 128 * 127, which one fits.
template <int BITS> struct Stage {
    I16 pairs;
    void begin(I16) { pairs = izero(); }
    void add(Line codes, I16 x) { pairs = iadd_pairs(pairs, pairs_unsigned(codes, x)); }
    I16 end(I16 so_far) const { return iadd(so_far, iwiden(pairs)); }
};
template <> struct Stage<8> {
    I16 sums;
    void begin(I16 so_far) { sums = so_far; }
    void add(Line codes, I16 x) { sums = iadd(sums, iwiden(pairs_signed(codes, x))); }
    I16 end(I16) const { return sums; }
};

#endif

}  // namespace keye
