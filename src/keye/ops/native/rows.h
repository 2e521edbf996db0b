// Stored rows: where a token's row is, and its numbers as operands of products. keye/ops/kv_blocks.py defines the bytes.
#pragma once
#include <cmath>
#include <cstring>
#include "keye.h"
#include "product.h"

namespace keye {

constexpr int MAX_DIM = 256;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline const char *row_of(const KeyeRows &rows, int64_t position) {
    return (const char *)rows.blocks[position >> 6] + (position & 63) * rows.row_bytes;
}

// Asks for the cache lines of some bytes ahead of their use. (By hand: a function in which gcc sees nothing but prefetches
// has no effect in its eyes, and its calls vanish.)
inline void prefetch(const char *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) asm volatile("prefetcht0 (%0)" ::"r"(from + at));
}

inline float from_bfloat(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + (bits >> 16 & 1) + 0x7fff) >> 16);
}

// The 256 values of float8 e4m3.
struct Fp8Table {
    float value[256];
    Fp8Table() {
        for (int code = 0; code < 256; code++) {
            int exponent = code >> 3 & 15, mantissa = code & 7;
            float x = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp((float)mantissa, -9);
            if (exponent == 15 && mantissa == 7) x = NAN;
            value[code] = code & 128 ? -x : x;
        }
    }
};
inline const float *fp8_values() {
    static const Fp8Table table;
    return table.value;
}

// One head of one row as `dim` floats (a multiple of 16). int4 stays Hadamard transformed.
inline void decode_head(const KeyeRows &rows, const char *head, float *out) {
    const int dim = rows.dim;
    const uint8_t *bytes = (const uint8_t *)head;
    switch (rows.kind) {
    case KEYE_FLOAT32: std::memcpy(out, head, (size_t)dim * 4); return;
    case KEYE_FLOAT16:
        for (int i = 0; i < dim; i += LANES) vstore(out + i, vfrom_half((const uint16_t *)head + i));
        return;
    case KEYE_BFLOAT16:
        for (int i = 0; i < dim; i += LANES) vstore(out + i, vfrom_bfloat((const uint16_t *)head + i));
        return;
    case KEYE_FP8:
    case KEYE_INT8: {
        uint16_t bits;
        std::memcpy(&bits, bytes + dim, 2);
        V scale = vset1(from_bfloat(bits));
        for (int i = 0; i < dim; i += LANES) {
            V x = rows.kind == KEYE_INT8 ? vfrom_int8((const int8_t *)bytes + i) : vfrom_table(fp8_values(), bytes + i);
            vstore(out + i, vmul(x, scale));
        }
        return;
    }
    default: {
        const int group = dim < 64 ? dim : 64, half = group / 2;
        alignas(64) float low[MAX_DIM], high[MAX_DIM];
        for (int i = 0; i < dim / 2; i += LANES) {
            V a, b;
            vfrom_int4(bytes + i, &a, &b);
            vstore(low + i, a);
            vstore(high + i, b);
        }
        for (int g = 0; g < dim / group; g++) {
            uint16_t bits;
            std::memcpy(&bits, bytes + dim / 2 + 2 * g, 2);
            V scale = vset1(from_bfloat(bits)), eight = vset1(8.0f);
            for (int i = 0; i < half; i += LANES) {
                vstore(out + g * group + i, vmul(vsub(vload(low + g * half + i), eight), scale));
                vstore(out + g * group + half + i, vmul(vsub(vload(high + g * half + i), eight), scale));
            }
        }
    }
    }
}

#if defined(KEYE_BF16)
// One head of int4 codes in groups of 64 as bfloat16: the 16 products of a scale are a table.
inline void decode_int4(const uint8_t *head, int dim, uint16_t *out) {
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    for (int g = 0; g < dim / 64; g++) {
        uint16_t bits;
        std::memcpy(&bits, head + dim / 2 + 2 * g, 2);
        const __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codes, _mm512_set1_ps(from_bfloat(bits))));
        const __m512i table = _mm512_castsi256_si512(values);
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(head + g * 32)));
        const __m512i low = _mm512_and_si512(pairs, _mm512_set1_epi16(15)), high = _mm512_srli_epi16(pairs, 4);
        _mm512_storeu_si512(out + g * 64, _mm512_permutexvar_epi16(low, table));
        _mm512_storeu_si512(out + g * 64 + 32, _mm512_permutexvar_epi16(high, table));
    }
}
#endif

// `count` numbers of an ordinary dtype as floats.
inline void load_plain(int32_t dtype, const void *from, int64_t offset, int count, float *out) {
    for (int i = 0; i < count; i += LANES) {
        if (dtype == KEYE_FLOAT32) vstore(out + i, vload((const float *)from + offset + i));
        else if (dtype == KEYE_FLOAT16) vstore(out + i, vfrom_half((const uint16_t *)from + offset + i));
        else vstore(out + i, vfrom_bfloat((const uint16_t *)from + offset + i));
    }
}

inline void store_plain(int32_t dtype, void *to, int64_t offset, int count, const float *x) {
    for (int i = 0; i < count; i += LANES) {
        if (dtype == KEYE_FLOAT32) vstore((float *)to + offset + i, vload(x + i));
        else if (dtype == KEYE_FLOAT16) vto_half((uint16_t *)to + offset + i, vload(x + i));
        else vto_bfloat((uint16_t *)to + offset + i, vload(x + i));
    }
}

// Floats as operands of a product, with zeros up to `padded`.
template <class P> inline void to_operand(const float *x, int dim, int padded, typename P::Elem *out) {
    for (int i = 0; i < dim; i += LANES) P::store(out + i, vload(x + i));
    for (int i = dim; i < padded; i++) out[i] = 0;
}

// Orthonormal Sylvester-Hadamard transform of `dim` floats, a power of two, in place.
inline void hadamard(float *x, int dim) {
    for (int step = 1; step < dim; step *= 2)
        for (int i = 0; i < dim; i += 2 * step)
            for (int j = i; j < i + step; j++) {
                float a = x[j], b = x[j + step];
                x[j] = a + b;
                x[j + step] = a - b;
            }
    const float scale = 1.0f / std::sqrt((float)dim);
    for (int i = 0; i < dim; i++) x[i] *= scale;
}

// Rows of one head as operands of products P: read where they are, or decoded first.
template <class P> struct Source {
    using Elem = typename P::Elem;
    const KeyeRows &rows;
    int padded;      // dimensions of an operand
    bool in_place;   // the stored bytes are the operand

    Source(const KeyeRows &r, int pad_to)
        : rows(r), padded((int)round_up(r.dim, pad_to)),
          in_place(r.kind == (P::PAIR == 2 ? KEYE_BFLOAT16 : KEYE_FLOAT32) && r.dim % pad_to == 0) {}

    const Elem *place(int64_t position, int head) const {
        return (const Elem *)(row_of(rows, position) + (int64_t)head * rows.head_bytes);
    }
    void decode(int64_t position, int head, Elem *out) const {
        decode_from(row_of(rows, position) + (int64_t)head * rows.head_bytes, out);
    }
    void decode_from(const char *from, Elem *out) const {
        if (in_place) {
            std::memcpy(out, from, (size_t)padded * sizeof(Elem));
            return;
        }
#if defined(KEYE_BF16)
        if constexpr (P::PAIR == 2)
            if (rows.kind == KEYE_INT4 && rows.dim % 64 == 0) return decode_int4((const uint8_t *)from, rows.dim, out);
#endif
        alignas(64) float x[MAX_DIM];
        decode_head(rows, from, x);
        to_operand<P>(x, rows.dim, padded, out);
    }
};

// LANES rows as one panel: unit u of lane i is unit u of row i. Products then have one key in each lane.
inline void pack_panel(const float *const *rows, int units, float *panel) {
    for (int u = 0; u < units; u += LANES) {
        V r[LANES];
        for (int i = 0; i < LANES; i++) r[i] = vload(rows[i] + u);
        vtranspose(r);
        for (int i = 0; i < LANES; i++) vstore(panel + (u + i) * LANES, r[i]);
    }
}

}  // namespace keye
