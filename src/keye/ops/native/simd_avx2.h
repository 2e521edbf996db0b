// Vectors of 8 floats: AVX2, FMA and F16C. The same functions as simd_avx512.h.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace keye {

constexpr int LANES = 8;
constexpr int SCORE_HEADS = 4, SCORE_PANELS = 2;
constexpr int VALUE_HEADS = 4;

using V = __m256;

inline V vload(const float *p) { return _mm256_loadu_ps(p); }
inline void vstore(float *p, V x) { _mm256_storeu_ps(p, x); }
inline V vset1(float x) { return _mm256_set1_ps(x); }
inline V vzero() { return _mm256_setzero_ps(); }
inline V vadd(V a, V b) { return _mm256_add_ps(a, b); }
inline V vsub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V vmul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V vdiv(V a, V b) { return _mm256_div_ps(a, b); }
inline V vfma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand where either is NaN.
inline V vmax(V a, V b) { return _mm256_max_ps(a, b); }
inline V vmin(V a, V b) { return _mm256_min_ps(a, b); }
inline uint32_t vgreater(V a, V b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
// a where the mask has a bit, else b.
inline V vselect(uint32_t mask, V a, V b) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bit), bit);
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(chosen));
}
inline float vsum(V x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
inline float vlargest(V x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
inline V vround(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2 ** n for whole n in -126 .. 127.
inline V vscale2(V x, V n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}

// Vectors of LANES integers, or of four times as many codes.
using VI = __m256i;
inline VI viload(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline VI viset1(int32_t x) { return _mm256_set1_epi32(x); }
inline VI viflip(VI x) { return _mm256_xor_si256(x, _mm256_set1_epi8((char)0x80)); }
inline V vfrom_int(VI x) { return _mm256_cvtepi32_ps(x); }
// Each integer of `sum` grows by the products of its four codes of a and b: those of a unsigned, or both in -127 .. 127.
#if defined(KEYE_VNNI)
// (By hand: gcc 12 copies every sum around its intrinsic, which takes twice as long as the products.)
inline VI vidot_unsigned(VI sum, VI a, VI b) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
}
#endif
inline VI vidot_signed(VI sum, VI a, VI b) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Appends the scores whose mask bit is set, and their positions first + lane.
inline int vcompress(uint32_t mask, V scores, int32_t first, float *out_scores, int32_t *out_positions) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, scores);
    int count = 0;
    for (; mask; mask &= mask - 1, count++) {
        int lane = __builtin_ctz(mask);
        out_scores[count] = lanes[lane];
        out_positions[count] = first + lane;
    }
    return count;
}

// Integers that order as the floats do (a two's complement view of sign and magnitude).
inline void vorder(const float *scores, int32_t *keys) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)scores);
    bits = _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
    _mm256_storeu_si256((__m256i *)keys, bits);
}
inline uint32_t vkeys_greater(const int32_t *keys, int32_t than) {
    __m256i found = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)keys), _mm256_set1_epi32(than));
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(found));
}
inline int vcount_greater(const int32_t *keys, int32_t than) { return __builtin_popcount(vkeys_greater(keys, than)); }
inline uint32_t vkeys_equal(const int32_t *keys, int32_t to) {
    __m256i found = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)keys), _mm256_set1_epi32(to));
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(found));
}
inline int vcompress_pair(uint32_t mask, const float *scores, const int32_t *positions, float *to_scores,
                          int32_t *to_positions) {
    int count = 0;
    for (; mask; mask &= mask - 1, count++) {
        int lane = __builtin_ctz(mask);
        to_scores[count] = scores[lane];
        to_positions[count] = positions[lane];
    }
    return count;
}

// Sums the 8 lanes of each of 8 vectors; lane i of the result is the sum of a[i]. Every vector is summed by the same
// tree, whatever its place.
inline V vsum_each(V *a) {
    V t[4], u[2];
    for (int i = 0; i < 4; i++)
        t[i] = vadd(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 2; i++) {
        __m256d x = _mm256_castps_pd(t[2 * i]), y = _mm256_castps_pd(t[2 * i + 1]);
        u[i] = vadd(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return vadd(_mm256_permute2f128_ps(u[0], u[1], 0x20), _mm256_permute2f128_ps(u[0], u[1], 0x31));
}

// Transposes 8 vectors of 8 four-byte units.
inline void vtranspose(V *r) {
    V t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            __m256d x = _mm256_castps_pd(t[i + j]), y = _mm256_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
            r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
        }
    for (int k = 0; k < 4; k++) {
        t[k] = _mm256_permute2f128_ps(r[k], r[k + 4], 0x20);
        t[k + 4] = _mm256_permute2f128_ps(r[k], r[k + 4], 0x31);
    }
    for (int k = 0; k < 8; k++) r[k] = t[k];
}

// Part i of PARTS equal parts of a vector goes to out + i * stride.
template <int PARTS> inline void vscatter(V x, float *out, int64_t stride) {
    if constexpr (PARTS == 1) {
        vstore(out, x);
    } else if constexpr (PARTS == 2) {
        _mm_storeu_ps(out, _mm256_castps256_ps128(x));
        _mm_storeu_ps(out + stride, _mm256_extractf128_ps(x, 1));
    } else {
        static_assert(PARTS == 4, "heads are taken four, two or one at a time");
        __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
        _mm_storel_pi((__m64 *)out, low);
        _mm_storeh_pi((__m64 *)(out + stride), low);
        _mm_storel_pi((__m64 *)(out + 2 * stride), high);
        _mm_storeh_pi((__m64 *)(out + 3 * stride), high);
    }
}

// 8 numbers of a narrow format to floats.
inline V vfrom_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline V vfrom_bfloat(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline V vfrom_int8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
inline V vfrom_table(const float *table, const uint8_t *p) {
    return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)), 4);
}
// Eight bytes of int4 codes: the low halves, and the high halves, as code + 8.
inline void vfrom_int4(const uint8_t *p, V *low, V *high) {
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    *low = _mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)));
    *high = _mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4));
}
inline void vto_half(uint16_t *p, V x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Rounds to nearest, ties to even; NaN stays NaN.
inline void vto_bfloat(uint16_t *p, V x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}

}  // namespace keye
