// Scales of groups of weights, searched for the smallest squared error, as keye/ops/scales.py defines it: one group a
// lane, so that a candidate costs a few instructions a number.
#pragma once
#include "keye.h"
#ifdef KEYE_AVX512
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace keye {

constexpr int MAX_GROUP = 256;  // numbers of a group
constexpr int SCALE_FITS = 2;
constexpr float TINY_NUMBER = 1e-30f;

inline V vmagnitude(V x) { return vmax(x, vsub(vzero(), x)); }
// 1 / x, and 0 for 0.
inline V vinverse(V x) {
    uint32_t some = vgreater(vmagnitude(x), vzero());
    return vselect(some, vdiv(vset1(1), vselect(some, x, vset1(1))), vzero());
}

// Numbers of LANES groups, transposed: x[i] has number i of each.
struct Groups {
    const V *x;
    int n;
};

struct Fit {
    V gain, scale, minimum;

    void improve(const Fit &other) {
        uint32_t take = vgreater(other.gain, gain);
        gain = vselect(take, other.gain, gain);
        scale = vselect(take, other.scale, scale);
        minimum = vselect(take, other.minimum, minimum);
    }
};

inline Fit fit_symmetric(Groups groups, V inverse, V low, V high) {
    V xl = vzero(), ll = vzero();
    for (int i = 0; i < groups.n; i++) {
        V code = vmin(vmax(vround(vmul(groups.x[i], inverse)), low), high);
        xl = vfma(groups.x[i], code, xl);
        ll = vfma(code, code, ll);
    }
    V scale = vdiv(xl, vmax(ll, vset1(1)));
    return {vmul(scale, xl), scale, vzero()};
}

inline Fit search_symmetric(Groups groups, float lowest, float highest) {
    V peak = vzero(), top = vzero(), low = vset1(lowest), high = vset1(highest);
    for (int i = 0; i < groups.n; i++) {
        V size = vmagnitude(groups.x[i]);
        uint32_t more = vgreater(size, top);
        top = vselect(more, size, top);
        peak = vselect(more, groups.x[i], peak);
    }
    peak = vselect(vgreater(top, vset1(TINY_NUMBER)), peak, vset1(1));
    Fit best{vzero(), vzero(), vzero()};
    for (int step = -9; step <= 9; step++)
        best.improve(fit_symmetric(groups, vdiv(vset1(lowest + 0.1f * step), peak), low, high));
    for (int i = 0; i < SCALE_FITS; i++) best.improve(fit_symmetric(groups, vinverse(best.scale), low, high));
    return best;
}

inline Fit fit_affine(Groups groups, V total, V inverse, V offset, V levels) {
    V l = vzero(), ll = vzero(), xl = vzero(), n = vset1((float)groups.n);
    for (int i = 0; i < groups.n; i++) {
        V code = vmin(vmax(vround(vmul(vsub(groups.x[i], offset), inverse)), vzero()), levels);
        l = vadd(l, code);
        ll = vfma(code, code, ll);
        xl = vfma(groups.x[i], code, xl);
    }
    V spread = vsub(vmul(n, ll), vmul(l, l));  // 0 where all codes are equal
    V scale = vdiv(vsub(vmul(n, xl), vmul(total, l)), vmax(spread, vset1(1)));
    scale = vselect(vgreater(spread, vzero()), scale, vzero());
    V minimum = vdiv(vsub(total, vmul(scale, l)), n);
    uint32_t above = vgreater(minimum, vzero());
    scale = vselect(above, vdiv(xl, vmax(ll, vset1(1))), scale);
    minimum = vselect(above, vzero(), minimum);
    return {vadd(vmul(scale, xl), vmul(minimum, total)), scale, minimum};
}

inline Fit search_affine(Groups groups, float highest) {
    V least = vzero(), most = groups.x[0], total = vzero(), levels = vset1(highest);
    for (int i = 0; i < groups.n; i++) {
        least = vmin(least, groups.x[i]);
        most = vmax(most, groups.x[i]);
        total = vadd(total, groups.x[i]);
    }
    V width = vsub(most, least);
    width = vselect(vgreater(width, vset1(TINY_NUMBER)), width, vset1(1));
    Fit best{vzero(), vzero(), vzero()};
    for (int step = -10; step <= 10; step++)
        best.improve(fit_affine(groups, total, vdiv(vset1(highest + 0.1f * step), width), least, levels));
    for (int i = 0; i < SCALE_FITS; i++)
        best.improve(fit_affine(groups, total, vinverse(best.scale), best.minimum, levels));
    return best;
}

// Searches the groups x [count, n], n a multiple of 16 up to MAX_GROUP; symmetric where there are no minima to write.
inline void search_scales(const float *x, int64_t count, int n, float low, float high, float *scales, float *minima) {
    V columns[MAX_GROUP];
    for (int64_t first = 0; first < count; first += LANES) {
        const int64_t last = count - 1;
        for (int begin = 0; begin < n; begin += LANES) {
            for (int lane = 0; lane < LANES; lane++)
                columns[begin + lane] = vload(x + (first + lane < last ? first + lane : last) * n + begin);
            vtranspose(columns + begin);
        }
        const Fit best = minima ? search_affine({columns, n}, high) : search_symmetric({columns, n}, low, high);
        float scale[LANES], minimum[LANES];
        vstore(scale, best.scale);
        vstore(minimum, best.minimum);
        for (int lane = 0; lane < LANES && first + lane < count; lane++) {
            scales[first + lane] = scale[lane];
            if (minima) minima[first + lane] = minimum[lane];
        }
    }
}

// The nearest codes less `low`; minima may be null.
inline void encode(const float *x, int64_t count, int n, float low, float high, const float *scales, const float *minima,
                   uint8_t *codes) {
    for (int64_t g = 0; g < count; g++, x += n, codes += n) {
        const float inverse = scales[g] != 0 ? 1 / scales[g] : 0, minimum = minima ? minima[g] : 0;
        for (int i = 0; i < n; i++) {
            float value = (x[i] - minimum) * inverse;
            value = value > low ? value : low;
            value = value < high ? value : high;
            codes[i] = (uint8_t)(int)(__builtin_rintf(value) - low);
        }
    }
}

}  // namespace keye
