// Vectors to stored rows of int8 or int4 codes, as RowFormat.encode of keye/ops/kv_blocks.py defines them.
#pragma once
#include "rows.h"

namespace keye {

constexpr int ENCODE_SHARES = 8;  // scales that are tried for a group of int4 codes
constexpr float INT4_SHARES[ENCODE_SHARES] = {1.05f, 1.0f, 0.97f, 0.94f, 0.91f, 0.88f, 0.85f, 0.82f};

// One vector of `dim` numbers, a multiple of 16, as codes and the scale behind them. Numbers that are not finite make the
// scale NaN: maxima overlook them.
inline void encode_int8(const float *x, int dim, uint8_t *out) {
    V most = vzero(), bad = vzero();
    for (int d = 0; d < dim; d += LANES) {
        most = vmax(vmax(vload(x + d), vsub(vzero(), vload(x + d))), most);
        bad = vfma(vload(x + d), vzero(), bad);
    }
    const float exact = std::max(vlargest(most) / 127.0f, 1e-30f) + vsum(bad);
    float scale = from_bfloat(to_bfloat(exact));
    if (scale < exact) scale = from_bfloat(to_bfloat(scale * (1 + 0.0078125f)));
    for (int d = 0; d < dim; d++) {
        const float code = std::min(std::max(std::nearbyint(x[d] / scale), -127.0f), 127.0f);
        out[d] = code == code ? (uint8_t)(int8_t)code : 0;
    }
    const uint16_t bits = to_bfloat(scale);
    std::memcpy(out + dim, &bits, 2);
}

inline V int4_codes(const float *x, float scale) {
    const V code = vround(vdiv(vload(x), vset1(scale)));
    return vmax(vsub(vzero(), vmax(vsub(vzero(), code), vset1(-7.0f))), vset1(-8.0f));
}

// The scale of a group that leaves the least squared error among a few; NaN where no error is a finite number.
inline float int4_scale(const float *x, int group) {
    int at = 0;
    for (int d = 1; d < group; d++)
        if (std::fabs(x[d]) > std::fabs(x[at])) at = d;
    float largest = x[at] / -8.0f, best = NAN, least = INFINITY;
    if (std::fabs(largest) < 1e-30f) largest = 1e-30f;
    for (float share : INT4_SHARES) {
        const float scale = from_bfloat(to_bfloat(largest * share));
        V sum = vzero();
        for (int d = 0; d < group; d += LANES) {
            const V error = vsub(vmul(int4_codes(x + d, scale), vset1(scale)), vload(x + d));
            sum = vfma(error, error, sum);
        }
        const float error = vsum(sum);
        if (error < least) {
            least = error;
            best = scale;
        }
    }
    return best;
}

// One vector, Hadamard transformed, as codes of groups of `group` dimensions, a multiple of 32, and their scales.
inline void encode_int4(float *x, int dim, int group, uint8_t *out) {
    for (int step = 1; step < dim; step *= 2)
        for (int i = 0; i < dim; i += 2 * step)
            for (int j = i; j < i + step; j++) {
                const float a = x[j], b = x[j + step];
                x[j] = a + b;
                x[j + step] = a - b;
            }
    const float norm = (float)std::pow((double)dim, -0.5);
    for (int i = 0; i < dim; i++) x[i] *= norm;
    for (int g = 0; g < dim / group; g++) {
        const float *from = x + g * group, scale = int4_scale(from, group);
        alignas(64) float codes[MAX_DIM];
        for (int d = 0; d < group; d += LANES) vstore(codes + d, int4_codes(from + d, scale));
        for (int d = 0; d < group / 2; d++)
            out[g * group / 2 + d] = (uint8_t)(((int)codes[d] + 8) | ((int)codes[d + group / 2] + 8) << 4);
        const uint16_t bits = to_bfloat(scale);
        std::memcpy(out + dim / 2 + 2 * g, &bits, 2);
    }
}

inline void encode_rows(const KeyeEncode &call) {
    for (int64_t i = 0; i < call.vectors; i++) {
        alignas(64) float x[MAX_DIM];
        load_plain((int32_t)call.dtype, call.x, i * call.dim, (int)call.dim, x);
        uint8_t *out = (uint8_t *)call.out + i * call.head_bytes;
        if (call.kind == KEYE_INT8) encode_int8(x, (int)call.dim, out);
        else encode_int4(x, (int)call.dim, (int)std::min<int64_t>(call.dim, 64), out);
    }
}

}  // namespace keye
