// What both passes of attention in training share: which keys a block of queries visits and in which order, and sums into
// rows that many queries add to.
#pragma once
#include "attend.h"
#include "train.h"

namespace keye {

constexpr int TRAIN_BLOCK = 32;         // queries of a block
constexpr int TRAIN_TILE = 512;         // rows of keys that all queries of a block visit before the next ones: they, and
                                        // the sums of their gradients, fit the second cache
constexpr int VISIT_ROOM = BATCH_KEYS + 2 * LANES;  // numbers of a head in one visit
constexpr float LN_2 = 0.6931471805599453f;

// Float32 sums of the gradients of rows first .. first + rows.
struct KeySums {
    float *k = nullptr, *v = nullptr, *indexer_k = nullptr;
    int64_t first = 0;
};

// Queries begin .. begin + n and their sets.
struct TrainBlock {
    int64_t begin;
    int n;
    int sizes[TRAIN_BLOCK];

    TrainBlock(const KeyeTrain &call, int64_t at)
        : begin(at), n((int)std::min<int64_t>(TRAIN_BLOCK, call.queries - at)) {
        for (int i = 0; i < n; i++) {
            const int32_t *set = call.sets + (begin + i) * call.width;
            sizes[i] = (int)(std::partition_point(set, set + call.width, [](int32_t row) { return row >= 0; }) - set);
        }
    }

    // Calls use(i, from, count, set) for parts of at most BATCH_KEYS entries of each query's set, `set` being the first of
    // them and `from` even. Every entry is handed over once and in order; queries that share keys visit them at about the same time.
    template <class Use> void visit(const KeyeTrain &call, Use use) const {
        int cursor[TRAIN_BLOCK] = {};
        int64_t least = INT64_MAX;
        for (int i = 0; i < n; i++)
            if (sizes[i]) least = std::min<int64_t>(least, call.sets[(begin + i) * call.width]);
        int left = 0;
        for (int i = 0; i < n; i++) left += sizes[i] > 0;
        for (int64_t stop = least; left;) {
            stop = stop + TRAIN_TILE < call.keys ? stop + TRAIN_TILE : INT64_MAX;  // the last tile takes what is left
            for (int i = 0; i < n; i++) {
                const int32_t *set = call.sets + (begin + i) * call.width;
                int &from = cursor[i];
                if (from == sizes[i]) continue;
                int to = from;
                while (to < sizes[i] && set[to] < stop) to++;
                if (to < sizes[i]) to -= (to - from) % 2;  // sums of pairs are those of inference, to the last bit
                for (; from < to; from += std::min(BATCH_KEYS, to - from))
                    use(i, from, std::min(BATCH_KEYS, to - from), set + from);
                left -= from == sizes[i];
            }
        }
    }
};

// Pointers to one head of some rows, followed by LANES more that may be read.
template <class P> struct HeadRows {
    const typename P::Elem *rows[BATCH_KEYS + LANES];

    HeadRows(const void *base, int64_t stride, int64_t offset, const int32_t *set, int count) {
        const typename P::Elem *first = (const typename P::Elem *)base + offset;
        for (int e = 0; e < count; e++) rows[e] = first + set[e] * stride;
        for (int e = count; e < count + LANES; e++) rows[e] = rows[count - 1];
    }
};

// Lanes of a vector at `at` that are below `count`.
inline uint32_t lanes_below(int count, int at) {
    const int left = count - at;
    return left >= LANES ? (uint32_t)((1ull << LANES) - 1) : (1u << std::max(left, 0)) - 1;
}

// out[h] += sum over entries of weight[h, entry] * row[entry], weights in float32. `packed` has room for HEADS of them as
// operands; sums are in the order that P::finish undoes.
template <class P>
inline void add_weighted(const float *weights, int64_t stride, int heads, const HeadRows<P> &rows, int count, int dim,
                         float *packed, float *out) {
    const int room = VISIT_ROOM / P::PAIR;
    for (int h = 0; h < heads; h++) {
        typename P::Elem *to = (typename P::Elem *)(packed + (int64_t)h * room);
        for (int e = 0; e < count; e += LANES)
            P::store(to + e, vselect(lanes_below(count, e), vload(weights + h * stride + e), vzero()));
    }
    add_values_heads<P>(packed, room, heads, rows.rows, 0, (count + P::PAIR - 1) / P::PAIR, dim, out);
}

template <class P> inline void finish_sums(float *sums, int64_t count) {
    for (int64_t d = 0; d < count; d += 2 * LANES) {
        V a = vload(sums + d), b = vload(sums + d + LANES);
        P::finish(&a, &b);
        vstore(sums + d, a);
        vstore(sums + d + LANES, b);
    }
}

// rows[entry] += sum over HEADS of weight[h, entry] * x[h], dimensions d .. d + VECS * LANES.
template <int HEADS, int VECS>
inline void scatter_part(const float *weights, int64_t stride, const float *x, int dim, int d, float *const *rows,
                         int count) {
    V part[HEADS][VECS];
    for (int h = 0; h < HEADS; h++)
        for (int c = 0; c < VECS; c++) part[h][c] = vload(x + h * dim + d + c * LANES);
    for (int e = 0; e < count; e++) {
        V sum[VECS];
        for (int c = 0; c < VECS; c++) sum[c] = vload(rows[e] + d + c * LANES);
        for (int h = 0; h < HEADS; h++) {
            const V w = vset1(weights[h * stride + e]);
            for (int c = 0; c < VECS; c++) sum[c] = vfma(w, part[h][c], sum[c]);
        }
        for (int c = 0; c < VECS; c++) vstore(rows[e] + d + c * LANES, sum[c]);
    }
}

template <int HEADS>
inline void scatter_some(const float *weights, int64_t stride, const float *x, int dim, float *const *rows, int count) {
    constexpr int WIDE = LANES == 16 ? (HEADS >= 8 ? 2 : 4) : 2;  // what the registers hold; dim is a multiple of 32
    int d = 0;
    for (; d + WIDE * LANES <= dim; d += WIDE * LANES)
        scatter_part<HEADS, WIDE>(weights, stride, x, dim, d, rows, count);
    for (; d < dim; d += 2 * LANES) scatter_part<HEADS, 2>(weights, stride, x, dim, d, rows, count);
}

inline void scatter(F32, const float *weights, int64_t stride, int heads, const float *x, int dim, float *const *rows,
                    int count, float *) {
    int h = 0;
    if constexpr (LANES == 16)
        for (; h + 8 <= heads; h += 8) scatter_some<8>(weights + h * stride, stride, x + h * dim, dim, rows, count);
    for (; h + 4 <= heads; h += 4) scatter_some<4>(weights + h * stride, stride, x + h * dim, dim, rows, count);
    for (; h + 2 <= heads; h += 2) scatter_some<2>(weights + h * stride, stride, x + h * dim, dim, rows, count);
    for (; h < heads; h++) scatter_some<1>(weights + h * stride, stride, x + h * dim, dim, rows, count);
}

#if defined(KEYE_BF16)
// The same for PAIRS pairs of heads, weights [PAIRS, VISIT_ROOM] as two bfloat16 each.
template <int PAIRS, int VECS>
inline void scatter_pairs(const float *weights, const uint16_t *x, int dim, int d, float *const *rows, int count) {
    V part[PAIRS][VECS];
    for (int p = 0; p < PAIRS; p++)
        for (int c = 0; c < VECS; c++) {
            const uint16_t *low = x + 2 * p * dim + d + c * LANES, *high = low + dim;
            const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)low));
            const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)high));
            part[p][c] = _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
    for (int e = 0; e < count; e++) {
        V sum[VECS];
        for (int c = 0; c < VECS; c++) sum[c] = vload(rows[e] + d + c * LANES);
        for (int p = 0; p < PAIRS; p++) {
            const V w = vset1(weights[p * VISIT_ROOM + e]);
            for (int c = 0; c < VECS; c++) sum[c] = BF16::madd(sum[c], w, part[p][c]);
        }
        for (int c = 0; c < VECS; c++) vstore(rows[e] + d + c * LANES, sum[c]);
    }
}

template <int PAIRS>
inline void scatter_pairs(const float *weights, const uint16_t *x, int dim, float *const *rows, int count) {
    int d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) scatter_pairs<PAIRS, 4>(weights, x, dim, d, rows, count);
    for (; d < dim; d += 2 * LANES) scatter_pairs<PAIRS, 2>(weights, x, dim, d, rows, count);
}

// `x` as operands, of an even number of heads; `packed` has room for a pair's weights each.
inline void scatter(BF16, const float *weights, int64_t stride, int heads, const uint16_t *x, int dim, float *const *rows,
                    int count, float *packed) {
    for (int h = 0; h < heads; h += 2)
        for (int e = 0; e < count; e += LANES) {
            const __m256i a = (__m256i)_mm512_cvtneps_pbh(vload(weights + h * stride + e));
            const __m256i b = (__m256i)_mm512_cvtneps_pbh(vload(weights + (h + 1) * stride + e));
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
            const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(a), high);
            vstore(packed + h / 2 * VISIT_ROOM + e, _mm512_castsi512_ps(both));
        }
    int p = 0;
    for (; p + 4 <= heads / 2; p += 4) scatter_pairs<4>(packed + p * VISIT_ROOM, x + 2 * p * dim, dim, rows, count);
    for (; p + 2 <= heads / 2; p += 2) scatter_pairs<2>(packed + p * VISIT_ROOM, x + 2 * p * dim, dim, rows, count);
    for (; p < heads / 2; p++) scatter_pairs<1>(packed + p * VISIT_ROOM, x + 2 * p * dim, dim, rows, count);
}

// An odd number of heads is summed in float32.
inline void scatter(BF16, const float *weights, int64_t stride, int heads, const float *x, int dim, float *const *rows,
                    int count, float *) {
    scatter(F32(), weights, stride, heads, x, dim, rows, count, nullptr);
}
#endif

// Logarithms to base 2 of numbers in 0 .. 1, relative to 1 exact to 2e-7; that of 0 is -127.
inline void log2_row(const float *x, float *out, int count) {
    for (int e = 0; e < count; e++) {
        uint32_t bits;
        std::memcpy(&bits, x + e, 4);
        const uint32_t mantissa = (bits & 0x7fffffu) | 0x3f800000u;
        float m;
        std::memcpy(&m, &mantissa, 4);
        const bool upper = m > 1.4142135f;
        const float half = upper ? 0.5f * m : m, t = (half - 1) / (half + 1), s = t * t;
        const float power = (float)((int32_t)(bits >> 23) - 127 + (upper ? 1 : 0));
        out[e] = power + t * (2.885390082f + s * (0.961796694f + s * (0.577078016f + s * (0.412198583f + s * 0.32059890f))));
    }
}

}  // namespace keye
