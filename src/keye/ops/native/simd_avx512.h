// Vectors of 16 floats: AVX-512 F, BW, DQ, VL.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace keye {

constexpr int LANES = 16;
// Register tiles: accumulators that stay in the 32 registers beside their operands.
constexpr int SCORE_HEADS = 8, SCORE_PANELS = 3;
constexpr int VALUE_HEADS = 8;

using V = __m512;

inline V vload(const float *p) { return _mm512_loadu_ps(p); }
inline void vstore(float *p, V x) { _mm512_storeu_ps(p, x); }
inline V vset1(float x) { return _mm512_set1_ps(x); }
inline V vzero() { return _mm512_setzero_ps(); }
inline V vadd(V a, V b) { return _mm512_add_ps(a, b); }
inline V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
inline V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand where either is NaN.
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline V vmin(V a, V b) { return _mm512_min_ps(a, b); }
inline uint32_t vgreater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// a where the mask has a bit, else b.
inline V vselect(uint32_t mask, V a, V b) { return _mm512_mask_blend_ps((__mmask16)mask, b, a); }
inline float vsum(V x) { return _mm512_reduce_add_ps(x); }
inline float vlargest(V x) { return _mm512_reduce_max_ps(x); }
inline V vround(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V vscale2(V x, V n) { return _mm512_scalef_ps(x, n); }

// Vectors of LANES integers, or of four times as many codes.
using VI = __m512i;
inline VI viload(const void *p) { return _mm512_loadu_si512(p); }
inline VI viset1(int32_t x) { return _mm512_set1_epi32(x); }
inline VI viflip(VI x) { return _mm512_xor_si512(x, _mm512_set1_epi8((char)0x80)); }
inline V vfrom_int(VI x) { return _mm512_cvtepi32_ps(x); }
// Each integer of `sum` grows by the products of its four codes of a and b: those of a unsigned, or both in -127 .. 127.
#if defined(KEYE_VNNI)
// (By hand: gcc 12 copies every sum around its intrinsic, which takes twice as long as the products.)
inline VI vidot_unsigned(VI sum, VI a, VI b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
#endif
inline VI vidot_signed(VI sum, VI a, VI b) {
    __m512i negated = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
    __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(a), negated);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

// Appends the scores whose mask bit is set, and their positions first + lane. Writes up to LANES entries.
inline int vcompress(uint32_t mask, V scores, int32_t first, float *out_scores, int32_t *out_positions) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Compressing in a register and storing all of it is far faster than a compressing store on some processors.
    _mm512_storeu_ps(out_scores, _mm512_maskz_compress_ps((__mmask16)mask, scores));
    __m512i positions = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
    _mm512_storeu_si512(out_positions, _mm512_maskz_compress_epi32((__mmask16)mask, positions));
    return __builtin_popcount(mask);
}

// Integers that order as the floats do (a two's complement view of sign and magnitude).
inline __m512i ordered(__m512i bits) {
    return _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
}
inline void vorder(const float *scores, int32_t *keys) {
    _mm512_storeu_si512(keys, ordered(_mm512_loadu_si512(scores)));
}
inline int vcount_greater(const int32_t *keys, int32_t than) {
    return __builtin_popcount(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(than)));
}
inline uint32_t vkeys_greater(const int32_t *keys, int32_t than) {
    return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(than));
}
inline uint32_t vkeys_equal(const int32_t *keys, int32_t to) {
    return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(to));
}
inline int vcompress_pair(uint32_t mask, const float *scores, const int32_t *positions, float *to_scores,
                          int32_t *to_positions) {
    V s = _mm512_maskz_compress_ps((__mmask16)mask, _mm512_loadu_ps(scores));
    __m512i p = _mm512_maskz_compress_epi32((__mmask16)mask, _mm512_loadu_si512(positions));
    _mm512_storeu_ps(to_scores, s);
    _mm512_storeu_si512(to_positions, p);
    return __builtin_popcount(mask);
}

// Sums the 16 lanes of each of 16 vectors; lane i of the result is the sum of a[i]. Every vector is summed by the same
// tree, whatever its place.
inline V vsum_each(V *a) {
    V t[8], u[4];
    for (int i = 0; i < 8; i++)
        t[i] = vadd(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(t[2 * i]), y = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = vadd(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    V v0 = vadd(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    V v1 = vadd(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return vadd(_mm512_shuffle_f32x4(v0, v1, 0x88), _mm512_shuffle_f32x4(v0, v1, 0xdd));
}

// Transposes 16 vectors of 16 four-byte units.
inline void vtranspose(V *r) {
    V t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d x = _mm512_castps_pd(t[i + j]), y = _mm512_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; k++) {
            t[i + k] = _mm512_shuffle_f32x4(r[i + k], r[i + k + 4], 0x88);
            t[i + k + 4] = _mm512_shuffle_f32x4(r[i + k], r[i + k + 4], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        r[k] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0x88);
        r[k + 8] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0xdd);
    }
}

// The first COUNT = 16, 8, 4, 2 or 1 lanes of each part of a vector: part i goes to out + i * stride.
template <int PARTS> inline void vscatter(V x, float *out, int64_t stride) {
    if constexpr (PARTS == 1) {
        vstore(out, x);
    } else if constexpr (PARTS == 2) {
        _mm256_storeu_ps(out, _mm512_castps512_ps256(x));
        _mm256_storeu_ps(out + stride, _mm512_extractf32x8_ps(x, 1));
    } else {
        static_assert(PARTS == 4, "heads are taken four, two or one at a time");
        _mm_storeu_ps(out, _mm512_castps512_ps128(x));
        _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(x, 1));
        _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(x, 2));
        _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(x, 3));
    }
}

// 16 half-precision or bfloat16 numbers to floats.
inline V vfrom_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline V vfrom_bfloat(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V vfrom_int8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
inline V vfrom_table(const float *table, const uint8_t *p) {
    return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)), table, 4);
}
// Sixteen bytes of int4 codes: the low halves, and the high halves, as code + 8.
inline void vfrom_int4(const uint8_t *p, V *low, V *high) {
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    *low = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
    *high = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
}
inline void vto_half(uint16_t *p, V x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Rounds to nearest, ties to even; NaN stays NaN.
inline void vto_bfloat(uint16_t *p, V x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

}  // namespace keye
