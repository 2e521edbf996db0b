// The kinds of matrix product: float32, bfloat16 with float32 sums, and for scores int8 with exact sums.
//
// All work on units of four bytes: one float, two neighbouring bfloat16, four codes. A kernel written once over units
// serves all. (Units are moved as floats whatever they hold; the build passes -fno-strict-aliasing.)
#pragma once
#if defined(KEYE_AVX512)
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace keye {

struct F32 {
    using Elem = float;
    static constexpr int PAIR = 1;  // elements of a unit
    static V madd(V sum, V a, V b) { return vfma(a, b, sum); }
    // Values of PAIR keys as operands of madd: 2 * LANES dimensions as two vectors, in an order that `finish` undoes.
    static void expand(const float *const *rows, int64_t dim, V *x, V *y) {
        *x = vload(rows[0] + dim);
        *y = vload(rows[0] + dim + LANES);
    }
    static void finish(V *, V *) {}
    static void store(float *p, V x) { vstore(p, x); }
};

#if defined(KEYE_BF16)
struct BF16 {
    using Elem = uint16_t;
    static constexpr int PAIR = 2;
    static V madd(V sum, V a, V b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static void expand(const uint16_t *const *rows, int64_t dim, V *x, V *y) {
        __m512i a = _mm512_loadu_si512(rows[0] + dim), b = _mm512_loadu_si512(rows[1] + dim);
        *x = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
        *y = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
    }
    static void finish(V *x, V *y) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        V low = _mm512_permutex2var_ps(*x, first, *y);
        *y = _mm512_permutex2var_ps(*x, second, *y);
        *x = low;
    }
    static void store(uint16_t *p, V x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }
};
#endif

// Codes in -127 .. 127. Where the processor multiplies unsigned codes by signed ones, those of keys are read with BIAS
// added, and a sum begins at what that adds to it in the end.
struct I8 {
    using Elem = int8_t;
    static constexpr int PAIR = 4;
#if defined(KEYE_VNNI)
    static constexpr int BIAS = 128;
    static VI key(const float *p) { return viflip(viload(p)); }
    static VI madd(VI sum, VI q, VI k) { return vidot_unsigned(sum, k, q); }
#else
    static constexpr int BIAS = 0;
    static VI key(const float *p) { return viload(p); }
    static VI madd(VI sum, VI q, VI k) { return vidot_signed(sum, q, k); }
#endif
};

// 2 ** x for x <= 0, relative error 1.2e-7 (Taylor of degree 6 on [-1/2, 1/2]). Below -126 the result is 2 ** -126, which
// no sum beside a term of 1 can see; -inf gives the same, so masked entries must be cleared by the caller.
inline V vexp2(V x) {
    x = vmax(x, vset1(-126.0f));
    V whole = vround(x), f = vsub(x, whole);
    V p = vset1(1.5403530e-4f);
    p = vfma(p, f, vset1(1.3333558e-3f));
    p = vfma(p, f, vset1(9.6181291e-3f));
    p = vfma(p, f, vset1(5.5504109e-2f));
    p = vfma(p, f, vset1(2.4022651e-1f));
    p = vfma(p, f, vset1(6.9314718e-1f));
    p = vfma(p, f, vset1(1.0f));
    return vscale2(p, whole);
}

}  // namespace keye
