// Indexer scores of a block of queries against every causal key, and their top-k, in one pass over the keys.
//
// I[t,s] = sum_j gate[t,j] * relu(q[t,j] . k[s]). Keys are in the lanes of vectors; each score is one chain of products
// over dimensions and one over heads, in fixed order. It is therefore the same to the last bit in every block and tile.
#pragma once
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
    Buffer<float> queries, keys, row;
    Buffer<float> scores;
    Buffer<int32_t> positions, ordered;
    Buffer<Candidates> candidates;
};

// HEADS heads against PANELS panels of keys; adds gate * relu(product) to each panel's scores.
template <class P, int HEADS, int PANELS>
inline void score_heads(const float *q, int units, const float *keys, const float *gate, V *scores) {
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
            scores[p] = vfma(vset1(gate[h]), vmax(vzero(), sum[h][p]), scores[p]);  // this order keeps NaN
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
inline void score_panels(const float *q, int heads, int units, const float *keys, const float *gate, V *scores) {
    for (int p = 0; p < SCORE_PANELS; p++) scores[p] = vzero();
#if defined(KEYE_AMX)
    if constexpr (P::PAIR == 2) {
        score_tiles(q, heads, units, keys, gate, scores);
        return;
    }
#endif
    int j = 0;
    for (; j + SCORE_HEADS <= heads; j += SCORE_HEADS)
        score_heads<P, SCORE_HEADS, SCORE_PANELS>(q + j * units, units, keys, gate + j, scores);
    if constexpr (SCORE_HEADS > 4)
        for (; j + 4 <= heads; j += 4) score_heads<P, 4, SCORE_PANELS>(q + j * units, units, keys, gate + j, scores);
    for (; j < heads; j++) score_heads<P, 1, SCORE_PANELS>(q + j * units, units, keys, gate + j, scores);
}

// Packs the indexer keys of positions start .. stop into panels; lanes beyond `stop` repeat the last key.
template <class P>
inline void pack_indexer_keys(const Source<P> &source, int64_t start, int64_t stop, float *rows, float *panels) {
    const int units = source.padded / P::PAIR;
    for (int64_t at = start; at < stop; at += LANES) {
        const float *lanes[LANES];
        for (int i = 0; i < LANES; i++) {
            int64_t position = std::min(at + i, stop - 1);
            if (source.in_place) {
                lanes[i] = (const float *)source.place(position, 0);
            } else {
                source.decode(position, 0, (typename P::Elem *)(rows + i * units));
                lanes[i] = rows + i * units;
            }
        }
        pack_panel(lanes, units, panels + (at - start) * units);
    }
}

// Leaves in scratch.candidates the best of the keys from .. to for queries begin .. begin + n of a stretch (counted from
// its first).
template <class P>
void score_range(const KeyeStep &step, const KeyeStretch &stretch, int64_t begin, int n, int64_t from, int64_t to,
                 ScoreScratch &scratch) {
    const Source<P> source(stretch.indexer_k, 32);
    const int heads = step.indexer_heads, padded = source.padded, units = padded / P::PAIR, topk = step.topk;
    const int64_t first = stretch.first + begin, row = stretch.start + begin;
    const int64_t stride_q = round_up(heads, HEAD_MULTIPLE) * units;
    float *q = scratch.queries.get(n * stride_q);
    std::fill(q, q + n * stride_q, 0.0f);
    float *panels = scratch.keys.get((int64_t)(SCORE_TILE + LANES * SCORE_PANELS) * units);
    float *decoded = scratch.row.get((int64_t)LANES * units);
    const int capacity = topk_capacity(topk), stride = capacity + 2 * LANES;
    float *scores = scratch.scores.get((int64_t)n * stride);
    int32_t *positions = scratch.positions.get((int64_t)n * stride);
    int32_t *ordered = scratch.ordered.get(stride);
    Candidates *candidates = scratch.candidates.get(n);
    Clock clock;
#if defined(KEYE_AMX)
    tile_begin();
#endif
    for (int i = 0; i < n; i++) {
        candidates[i].begin(scores + (int64_t)i * stride, positions + (int64_t)i * stride, capacity);
        for (int j = 0; j < heads; j++) {
            alignas(64) float x[MAX_DIM];
            load_plain(step.indexer_dtype, step.indexer_q, ((row + i) * heads + j) * step.indexer_dim, step.indexer_dim, x);
            to_operand<P>(x, step.indexer_dim, padded, (typename P::Elem *)(q + i * stride_q + (int64_t)j * units));
        }
    }
    to = std::min(to, first + n);
    for (int64_t tile = from; tile < to; tile += SCORE_TILE) {
        const int64_t stop = std::min(to, tile + SCORE_TILE);
        pack_indexer_keys(source, tile, stop, decoded, panels);
        for (int i = 0; i < n; i++) {
            Candidates &c = candidates[i];
            const float *gate = step.gate + (row + i) * heads;
            const int64_t visible = std::min(stop, first + i + 1);
            for (int64_t at = tile; at < visible; at += LANES * SCORE_PANELS) {
                if (c.count + LANES * SCORE_PANELS > c.capacity) {
                    clock.add(&Phases::score);
                    keep_best(c, topk, ordered);
                    clock.add(&Phases::select);
                }
                V s[SCORE_PANELS];
                score_panels<P>(q + i * stride_q, heads, units, panels + (at - tile) * units, gate, s);
                for (int p = 0; p < SCORE_PANELS; p++) {
                    int64_t left = visible - at - p * LANES;
                    if (left <= 0) break;
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
