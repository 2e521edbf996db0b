// Indexer scores of a block of queries against every causal key, and their top-k, in one pass over the keys.
//
// I[t,s] = sum_j gate[t,j] * relu(q[t,j] . k[s]). Keys are in the lanes of vectors; each score is one chain of products
// over dimensions and one over heads, in fixed order. It is therefore the same to the last bit in every block and tile.
//
// Keys that are stored as int8 meet queries that are rounded to int8 (`round_queries` of keye/ops/reference.py): codes
// are multiplied exactly, the scale of a query is part of its gates, and that of a key multiplies its score.
#pragma once
#include <type_traits>
#include "memory.h"
#include "rows.h"
#include "tiles.h"
#include "timers.h"
#include "topk.h"

namespace keye {

#if defined(KEYE_AMX)
constexpr int HEAD_MULTIPLE = 16;  // heads of a query are padded to whole tiles
#else
constexpr int HEAD_MULTIPLE = 1;
#endif
constexpr int SCORE_TILE = 192;  // keys packed at once: a multiple of LANES * SCORE_PANELS that fits the first cache

struct ScoreScratch {
    Buffer<float> queries, keys, row, gates, key_scales;
    Buffer<int32_t> sums;
    Buffer<float> scores;
    Buffer<int32_t> positions, ordered;
    Buffer<Candidates> candidates;
};

// The heads of one query: operands, gates, and where sums of codes begin.
struct QueryHeads {
    const float *q, *gate;
    const int32_t *sums;
};

// HEADS heads from `j` on against PANELS panels of keys; adds gate * relu(product) to each panel's scores.
template <class P, int HEADS, int PANELS>
inline void score_heads(const QueryHeads &query, int j, int units, const float *keys, V *scores) {
    const float *q = query.q + (int64_t)j * units;
    V sum[HEADS][PANELS];
    for (int h = 0; h < HEADS; h++)
        for (int p = 0; p < PANELS; p++) sum[h][p] = vzero();
    for (int u = 0; u < units; u++) {
        V k[PANELS];
        for (int p = 0; p < PANELS; p++) k[p] = vload(keys + ((int64_t)p * units + u) * LANES);
        for (int h = 0; h < HEADS; h++) {
            V x = vset1(q[h * units + u]);
            for (int p = 0; p < PANELS; p++) sum[h][p] = P::madd(sum[h][p], x, k[p]);
        }
    }
    for (int h = 0; h < HEADS; h++)
        for (int p = 0; p < PANELS; p++)
            scores[p] = vfma(vset1(query.gate[j + h]), vmax(vzero(), sum[h][p]), scores[p]);  // this order keeps NaN
}

// The same of codes.
template <int HEADS, int PANELS>
inline void score_codes(const QueryHeads &query, int j, int units, const float *keys, V *scores) {
    const int32_t *q = (const int32_t *)query.q + (int64_t)j * units;
    VI sum[HEADS][PANELS];
    for (int h = 0; h < HEADS; h++)
        for (int p = 0; p < PANELS; p++) sum[h][p] = viset1(query.sums[j + h]);
    for (int u = 0; u < units; u++) {
        VI k[PANELS];
        for (int p = 0; p < PANELS; p++) k[p] = I8::key(keys + ((int64_t)p * units + u) * LANES);
        for (int h = 0; h < HEADS; h++) {
            VI x = viset1(q[h * units + u]);
            for (int p = 0; p < PANELS; p++) sum[h][p] = I8::madd(sum[h][p], x, k[p]);
        }
    }
    for (int h = 0; h < HEADS; h++)
        for (int p = 0; p < PANELS; p++)
            scores[p] = vfma(vset1(query.gate[j + h]), vmax(vzero(), vfrom_int(sum[h][p])), scores[p]);
}

#if defined(KEYE_AMX)
// The same by tiles of 16 heads; `q` has zeros up to a multiple of 16 heads.
inline void score_tiles(const float *q, int heads, int units, const float *keys, const float *gate, V *scores) {
    alignas(64) float product[SCORE_PANELS][TILE_SIDE * LANES];
    for (int j = 0; j < heads; j += TILE_SIDE) {
        tile_panels(q + (int64_t)j * units, units, keys);
        tile_store<0>(product[0], 64);
        tile_store<1>(product[1], 64);
        tile_store<2>(product[2], 64);
        for (int h = 0; h < std::min(TILE_SIDE, heads - j); h++)
            for (int p = 0; p < SCORE_PANELS; p++)
                scores[p] = vfma(vset1(gate[j + h]), vmax(vzero(), vload(product[p] + h * LANES)), scores[p]);
    }
}
#endif

// All heads of one query against SCORE_PANELS panels.
template <class P>
inline void score_panels(const QueryHeads &query, int heads, int units, const float *keys, V *scores) {
    for (int p = 0; p < SCORE_PANELS; p++) scores[p] = vzero();
#if defined(KEYE_AMX)
    if constexpr (P::PAIR == 2) {
        score_tiles(query.q, heads, units, keys, query.gate, scores);
        return;
    }
#endif
    auto heads_from = [&](auto count, int j) {
        if constexpr (P::PAIR == 4) score_codes<count.value, SCORE_PANELS>(query, j, units, keys, scores);
        else score_heads<P, count.value, SCORE_PANELS>(query, j, units, keys, scores);
    };
    int j = 0;
    for (; j + SCORE_HEADS <= heads; j += SCORE_HEADS) heads_from(std::integral_constant<int, SCORE_HEADS>(), j);
    if constexpr (SCORE_HEADS > 4)
        for (; j + 4 <= heads; j += 4) heads_from(std::integral_constant<int, 4>(), j);
    for (; j < heads; j++) heads_from(std::integral_constant<int, 1>(), j);
}

// Where the rows of LANES positions from `at` (a multiple of LANES) on are; those from `stop` on repeat the last one.
inline void place_lanes(const KeyeRows &rows, int64_t at, int64_t stop, const char **lanes) {
    const char *first = row_of(rows, at);
    const int64_t last = stop - 1 - at;
    for (int64_t i = 0; i < LANES; i++) lanes[i] = first + std::min(i, last) * rows.row_bytes;
}

// Packs the indexer keys of positions start .. stop into panels; lanes beyond `stop` repeat the last key.
template <class P>
inline void pack_indexer_keys(const Source<P> &source, int64_t start, int64_t stop, float *copies, float *panels) {
    const int units = source.padded / P::PAIR;
    for (int64_t at = start; at < stop; at += LANES) {
        const char *places[LANES];
        const float *lanes[LANES];
        place_lanes(source.rows, at, stop, places);
        for (int i = 0; i < LANES; i++) {
            lanes[i] = source.in_place ? (const float *)places[i] : copies + i * units;
            if (!source.in_place) source.decode_from(places[i], (typename P::Elem *)(copies + i * units));
        }
        pack_panel(lanes, units, panels + (at - start) * units);
    }
}

// The same of int8 rows, and their scales.
inline void pack_indexer_codes(const KeyeRows &rows, int units, int64_t start, int64_t stop, float *copies, float *panels,
                               float *scales) {
    for (int64_t at = start; at < stop; at += LANES) {
        const char *places[LANES];
        const float *lanes[LANES];
        place_lanes(rows, at, stop, places);
        for (int i = 0; i < LANES; i++) {
            uint32_t bits;  // the last two codes, and the scale as the upper half of a float
            std::memcpy(&bits, places[i] + rows.dim - 2, 4);
            bits &= 0xffff0000u;
            std::memcpy(scales + (at - start) + i, &bits, 4);
            lanes[i] = (const float *)places[i];
            if (rows.dim != units * 4) {  // never read beyond a row; what the copy has behind it meets zeros
                std::memcpy(copies + i * units, places[i], (size_t)rows.dim);
                lanes[i] = copies + i * units;
            }
        }
        pack_panel(lanes, units, panels + (at - start) * units);
    }
}

// A query's head as codes; returns its scale, a power of two. NaN where it has numbers that are not finite.
inline float round_query(const float *x, int dim, int8_t *codes) {
    float largest = 0, total = 0;
    for (int i = 0; i < dim; i++) {
        largest = std::max(largest, std::fabs(x[i]));
        total += x[i];
    }
    if (!(std::fabs(total) + largest < INFINITY)) return NAN;
    int exponent;
    const float mantissa = std::frexp(largest, &exponent);
    exponent = std::max(exponent - (mantissa > 127.0f / 128 ? 6 : 7), -100);
    const float inverse = std::ldexp(1.0f, -exponent);  // exact, as the products are
    for (int i = 0; i < dim; i++) codes[i] = (int8_t)std::nearbyint(x[i] * inverse);
    return std::ldexp(1.0f, exponent);
}

// Queries begin .. begin + n of a step as operands with their gates.
template <class P>
inline void load_indexer_queries(const KeyeStep &step, int64_t row, int n, int units, int64_t stride_q,
                                 ScoreScratch &scratch) {
    const int heads = step.indexer_heads, dim = step.indexer_dim;
    float *q = scratch.queries.get(n * stride_q), *gates = scratch.gates.get((int64_t)n * heads);
    int32_t *sums = scratch.sums.get((int64_t)n * heads);
    std::fill(q, q + n * stride_q, 0.0f);
    std::copy_n(step.gate + row * heads, (int64_t)n * heads, gates);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < heads; j++) {
            alignas(64) float x[MAX_DIM];
            load_plain(step.indexer_dtype, step.indexer_q, ((row + i) * heads + j) * dim, dim, x);
            typename P::Elem *to = (typename P::Elem *)(q + i * stride_q + (int64_t)j * units);
            if constexpr (P::PAIR == 4) {
                gates[i * heads + j] *= round_query(x, dim, to);
                int total = 0;
                for (int d = 0; d < dim; d++) total += to[d];
                sums[i * heads + j] = -P::BIAS * total;
            } else {
                to_operand<P>(x, dim, units * P::PAIR, to);
            }
        }
}

// Leaves in scratch.candidates the best of the keys from .. to for queries begin .. begin + n of a stretch (counted from
// its first).
template <class P>
void score_range(const KeyeStep &step, const KeyeStretch &stretch, int64_t begin, int n, int64_t from, int64_t to,
                 ScoreScratch &scratch) {
    const KeyeRows &rows = stretch.indexer_k;
    const int heads = step.indexer_heads, topk = step.topk;
    const int units = (int)round_up(rows.dim, P::PAIR == 4 ? 64 : 32) / P::PAIR;
    const int64_t first = stretch.first + begin, row = stretch.start + begin;
    const int64_t stride_q = round_up(heads, HEAD_MULTIPLE) * units;
    load_indexer_queries<P>(step, row, n, units, stride_q, scratch);
    const float *q = scratch.queries.get(0), *gates = scratch.gates.get(0);
    const int32_t *sums = scratch.sums.get(0);
    float *panels = scratch.keys.get((int64_t)(SCORE_TILE + LANES * SCORE_PANELS) * units);
    float *decoded = scratch.row.get((int64_t)LANES * units);
    float *scales = scratch.key_scales.get(SCORE_TILE + LANES * SCORE_PANELS);
    const int capacity = topk_capacity(topk), stride = capacity + 2 * LANES;
    float *scores = scratch.scores.get((int64_t)n * stride);
    int32_t *positions = scratch.positions.get((int64_t)n * stride);
    int32_t *ordered = scratch.ordered.get(stride);
    Candidates *candidates = scratch.candidates.get(n);
    Clock clock;
#if defined(KEYE_AMX)
    tile_begin();
#endif
    for (int i = 0; i < n; i++)
        candidates[i].begin(scores + (int64_t)i * stride, positions + (int64_t)i * stride, capacity);
    to = std::min(to, first + n);
    for (int64_t tile = from; tile < to; tile += SCORE_TILE) {
        const int64_t stop = std::min(to, tile + SCORE_TILE);
        if constexpr (P::PAIR == 4) pack_indexer_codes(rows, units, tile, stop, decoded, panels, scales);
        else pack_indexer_keys(Source<P>(rows, 32), tile, stop, decoded, panels);
        for (int i = 0; i < n; i++) {
            Candidates &c = candidates[i];
            const QueryHeads query{q + i * stride_q, gates + (int64_t)i * heads, sums + (int64_t)i * heads};
            const int64_t visible = std::min(stop, first + i + 1);
            for (int64_t at = tile; at < visible; at += LANES * SCORE_PANELS) {
                if (c.count + LANES * SCORE_PANELS > c.capacity) {
                    clock.add(&Phases::score);
                    keep_best(c, topk, ordered);
                    clock.add(&Phases::select);
                }
                if (i == 0)  // asks for a part of the next tile, while the memory has nothing else to do
                    for (int64_t p = 0; p < SCORE_PANELS && at + SCORE_TILE + p * LANES < to; p++)
                        prefetch(row_of(rows, at + SCORE_TILE + p * LANES), LANES * rows.row_bytes);
                V s[SCORE_PANELS];
                score_panels<P>(query, heads, units, panels + (at - tile) * units, s);
                for (int p = 0; p < SCORE_PANELS; p++) {
                    int64_t left = visible - at - p * LANES;
                    if (left <= 0) break;
                    if constexpr (P::PAIR == 4) s[p] = vmul(s[p], vload(scales + (at - tile) + p * LANES));
                    uint32_t valid = left >= LANES ? (1u << LANES) - 1 : (1u << left) - 1;
                    offer(c, s[p], (int32_t)(at + p * LANES), valid);
                }
            }
        }
    }
    clock.add(&Phases::score);
    for (int i = 0; i < n; i++) keep_best(candidates[i], topk, ordered);
    clock.add(&Phases::select);
}

// Writes a query's candidates as its set: positions int32 [topk], ascending, -1 behind the last. Returns how many.
inline int write_set(const Candidates &c, int topk, int32_t *set) {
    std::copy(c.positions, c.positions + c.count, set);
    std::fill(set + c.count, set + topk, -1);
    return c.count;
}

}  // namespace keye
