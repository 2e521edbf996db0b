// Causal attention over every key, or over every key with each query's set as a mask.
//
// Keys and values are packed tile by tile for a block of queries; the softmax runs online under a rising maximum
// (Milakov and Gimelshein, arXiv:1805.02867). Tiles are at fixed positions, so that a query's result does not depend on
// the queries beside it.
#pragma once
#include "attend.h"
#include "tiles.h"

namespace keye {

constexpr int DENSE_TILE = 192;  // keys; a multiple of LANES * SCORE_PANELS
#if defined(KEYE_AMX)
constexpr int DENSE_ROWS = 16;   // rows (query and head) that pass a tile together
#else
constexpr int DENSE_ROWS = 8;
#endif

struct DenseScratch {
    Buffer<uint16_t> queries, row_copies;
    Buffer<float> keys, values, logits, out, most, total;
    Buffer<uint32_t> masks;
    Buffer<int> cursor;
};

template <class P, int ROWS>
inline void dense_logits(const float *q, int units, const float *keys, V scale, float *out) {
    V sum[ROWS][SCORE_PANELS];
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < SCORE_PANELS; p++) sum[r][p] = vzero();
    for (int u = 0; u < units; u++) {
        V k[SCORE_PANELS];
        for (int p = 0; p < SCORE_PANELS; p++) k[p] = vload(keys + ((int64_t)p * units + u) * LANES);
        for (int r = 0; r < ROWS; r++) {
            V x = vset1(q[r * units + u]);
            for (int p = 0; p < SCORE_PANELS; p++) sum[r][p] = P::madd(sum[r][p], x, k[p]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < SCORE_PANELS; p++) vstore(out + r * DENSE_TILE + p * LANES, vmul(sum[r][p], scale));
}

// out[r] += weights[r] . values, values packed as [2 * LANES dimensions][step][2 vectors].
template <class P, int ROWS>
inline void dense_values(const float *weights, const float *values, int steps, int dim, float *out) {
    for (int d = 0; d < dim; d += 2 * LANES) {
        const float *chunk = values + (int64_t)d * (DENSE_TILE / P::PAIR);
        V sum[ROWS][2];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 2; c++) sum[r][c] = vload(out + r * dim + d + c * LANES);
        for (int s = 0; s < steps; s++) {
            V x = vload(chunk + s * 2 * LANES), y = vload(chunk + s * 2 * LANES + LANES);
            for (int r = 0; r < ROWS; r++) {
                V w = vset1(weights[r * DENSE_TILE + s]);
                sum[r][0] = P::madd(sum[r][0], w, x);
                sum[r][1] = P::madd(sum[r][1], w, y);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 2; c++) vstore(out + r * dim + d + c * LANES, sum[r][c]);
    }
}

#if defined(KEYE_AMX)
// Both products by tiles, for 16 rows.
inline void tile_logits(const float *q, int units, const float *keys, V scale, float *out) {
    tile_panels(q, units, keys);
    tile_store<0>(out, DENSE_TILE * 4);
    tile_store<1>(out + LANES, DENSE_TILE * 4);
    tile_store<2>(out + 2 * LANES, DENSE_TILE * 4);
    for (int r = 0; r < TILE_SIDE; r++)
        for (int p = 0; p < SCORE_PANELS; p++) {
            float *at = out + r * DENSE_TILE + p * LANES;
            vstore(at, vmul(vload(at), scale));
        }
}

inline void tile_values(const float *weights, const float *values, int steps, int dim, float *out) {
    for (int d = 0; d < dim; d += 2 * LANES) {
        const float *chunk = values + (int64_t)d * (DENSE_TILE / 2);
        tile_load<0>(out + d, (int64_t)dim * 4);
        tile_load<1>(out + d + LANES, (int64_t)dim * 4);
        for (int s = 0; s < steps; s += TILE_SIDE) {
            tile_load<4>(weights + s, DENSE_TILE * 4);
            tile_load<6>(chunk + s * 2 * LANES, 2 * LANES * 4);
            tile_product<0, 4, 6>();
            tile_load<7>(chunk + s * 2 * LANES + LANES, 2 * LANES * 4);
            tile_product<1, 4, 7>();
        }
        tile_store<0>(out + d, (int64_t)dim * 4);
        tile_store<1>(out + d + LANES, (int64_t)dim * 4);
    }
}
#endif

// One row of logits of a tile: weights in place, running maximum and total; the sums so far are rescaled.
template <class P>
inline void online_softmax(float *logits, const uint32_t *mask, float *most, float *total, float *out, int dim) {
    V top = vset1(-INFINITY);
    for (int p = 0; p < DENSE_TILE / LANES; p++) {
        V x = vselect(mask[p], vload(logits + p * LANES), vset1(-INFINITY));
        vstore(logits + p * LANES, x);
        top = vmax(x, top);
    }
    const float raised = std::max(*most, vlargest(top));
    typename P::Elem *weights = (typename P::Elem *)logits;
    if (raised == -INFINITY) {  // nothing seen yet
        for (int p = 0; p < DENSE_TILE / LANES; p++) P::store(weights + p * LANES, vzero());
        return;
    }
    V sum = vzero(), at = vset1(raised);
    for (int p = 0; p < DENSE_TILE / LANES; p++) {
        V w = vselect(mask[p], vexp2(vsub(vload(logits + p * LANES), at)), vzero());
        sum = vadd(sum, w);
        P::store(weights + p * LANES, w);
    }
    if (raised != *most) {
        const float rescale = std::exp2(*most - raised);
        *total *= rescale;
        for (int d = 0; d < dim; d += LANES) vstore(out + d, vmul(vload(out + d), vset1(rescale)));
        *most = raised;
    }
    *total += vsum(sum);
}

// Which keys of a tile each query may see, one word of LANES bits a panel.
inline void tile_masks(const Sets *sets, int n, int64_t first, int64_t tile, int *cursor, uint32_t *masks) {
    constexpr int PANELS = DENSE_TILE / LANES;
    for (int i = 0; i < n; i++) {
        uint32_t *mask = masks + i * PANELS;
        if (!sets) {
            const int64_t visible = first + i + 1 - tile;
            for (int p = 0; p < PANELS; p++) {
                int64_t left = visible - p * LANES;
                mask[p] = left <= 0 ? 0 : left >= LANES ? (1u << LANES) - 1 : (1u << left) - 1;
            }
            continue;
        }
        std::fill(mask, mask + PANELS, 0);
        const int32_t *set = sets->positions + i * sets->stride;
        for (; cursor[i] < sets->sizes[i] && set[cursor[i]] < tile + DENSE_TILE; cursor[i]++) {
            int at = (int)(set[cursor[i]] - tile);
            mask[at / LANES] |= 1u << (at % LANES);
        }
    }
}

// Rows of a tile as panels: row(i, slot) is the operand of row i, and stays valid until its slot is used again.
template <class P, class Row> inline void pack_panels(int dim, Row row, float *panels) {
    const int units = dim / P::PAIR;
    for (int at = 0; at < DENSE_TILE; at += LANES) {
        const float *lanes[LANES];
        for (int i = 0; i < LANES; i++) lanes[i] = (const float *)row(at + i, i);
        pack_panel(lanes, units, panels + (int64_t)at * units);
    }
}

// The same rows, `count` of them, as dense_values reads them.
template <class P, class Row> inline void pack_values(int dim, int count, Row row, float *packed) {
    for (int s = 0; s < count / P::PAIR; s++) {
        const typename P::Elem *pair[P::PAIR];
        for (int i = 0; i < P::PAIR; i++) pair[i] = row(s * P::PAIR + i, i);
        for (int d = 0; d < dim; d += 2 * LANES) {
            V x, y;
            P::expand(pair, d, &x, &y);
            float *to = packed + (int64_t)d * (DENSE_TILE / P::PAIR) + s * 2 * LANES;
            vstore(to, x);
            vstore(to + LANES, y);
        }
    }
}

// Packs keys and values of one head at positions tile .. stop; the rest of the tile becomes zeros.
template <class P>
inline void pack_tile(const Source<P> &keys, const Source<P> &values, int head, int64_t tile, int64_t stop,
                      DenseScratch &scratch) {
    using Elem = typename P::Elem;
    const int dim = keys.padded;
    Elem *copies = (Elem *)scratch.row_copies.get((int64_t)LANES * dim * (int64_t)sizeof(Elem) / 2);
    alignas(64) static const Elem zeros[MAX_DIM] = {};
    auto row = [&](const Source<P> &source, int64_t position, int slot) -> const Elem * {
        if (position >= stop) return zeros;
        if (source.in_place) return source.place(position, head);
        source.decode(position, head, copies + (int64_t)slot * dim);
        return copies + (int64_t)slot * dim;
    };
    pack_panels<P>(dim, [&](int i, int slot) { return row(keys, tile + i, slot); },
                   scratch.keys.get((int64_t)DENSE_TILE * dim / P::PAIR));
    pack_values<P>(dim, DENSE_TILE, [&](int i, int slot) { return row(values, tile + i, slot); },
                   scratch.values.get((int64_t)DENSE_TILE * dim / P::PAIR));
}

// DENSE_ROWS rows against the packed tile. `masks` holds one pointer a row.
template <class P>
inline void dense_rows(const typename P::Elem *q, int dim, DenseScratch &scratch, V scale, const uint32_t *const *masks,
                       float *most, float *total, float *out) {
    alignas(64) float logits[DENSE_ROWS * DENSE_TILE];
    const int units = dim / P::PAIR;
    const float *keys = scratch.keys.get(0), *values = scratch.values.get(0);
#if defined(KEYE_AMX)
    constexpr bool tiles = P::PAIR == 2;
#else
    constexpr bool tiles = false;
#endif
    for (int at = 0; at < DENSE_TILE; at += LANES * SCORE_PANELS) {
        const float *panels = keys + (int64_t)at * units;
#if defined(KEYE_AMX)
        if constexpr (tiles) tile_logits((const float *)q, units, panels, scale, logits + at);
#endif
        if constexpr (!tiles)
            for (int r = 0; r < DENSE_ROWS; r += SCORE_HEADS)
                dense_logits<P, SCORE_HEADS>((const float *)(q + (int64_t)r * dim), units, panels, scale,
                                             logits + r * DENSE_TILE + at);
    }
    for (int r = 0; r < DENSE_ROWS; r++)
        online_softmax<P>(logits + r * DENSE_TILE, masks[r], most + r, total + r, out + (int64_t)r * dim, dim);
#if defined(KEYE_AMX)
    if constexpr (tiles) tile_values(logits, values, DENSE_TILE / P::PAIR, dim, out);
#endif
    if constexpr (!tiles)
        for (int r = 0; r < DENSE_ROWS; r += VALUE_HEADS)
            dense_values<P, VALUE_HEADS>(logits + r * DENSE_TILE, values, DENSE_TILE / P::PAIR, dim,
                                         out + (int64_t)r * dim);
}

// Attention of queries begin .. begin + n of a stretch; `sets` is null for every causal key.
template <class P>
void dense_block(const KeyeStep &step, const KeyeStretch &stretch, int64_t begin, int n, const Sets *sets,
                 DenseScratch &scratch) {
    using Elem = typename P::Elem;
    Clock clock;
#if defined(KEYE_AMX)
    tile_begin();
#endif
    constexpr int PANELS = DENSE_TILE / LANES;
    const Source<P> keys(stretch.k, PAD_TO), values(stretch.v, PAD_TO);
    const int groups = stretch.k.heads, heads = step.heads / groups, dim = keys.padded;
    const int64_t first = stretch.first + begin, token = stretch.start + begin, length = first + n;
    const int rows = n * heads, padded_rows = (int)round_up(rows, DENSE_ROWS);
    Elem *q = (Elem *)scratch.queries.get((int64_t)padded_rows * dim * (int64_t)sizeof(Elem) / 2);
    float *out = scratch.out.get((int64_t)padded_rows * dim);
    float *most = scratch.most.get(padded_rows), *total = scratch.total.get(padded_rows);
    uint32_t *masks = scratch.masks.get((int64_t)n * PANELS);
    int *cursor = scratch.cursor.get(n);
    const V scale = vset1(LOG2_E / std::sqrt((float)step.dim));
    for (int g = 0; g < groups; g++) {
        std::fill(q, q + (int64_t)padded_rows * dim, (Elem)0);
        for (int i = 0; i < n; i++)
            load_queries<P>(step, token + i, g * heads, heads, stretch.k.kind == KEYE_INT4, dim,
                            q + (int64_t)i * heads * dim);
        std::fill(out, out + (int64_t)padded_rows * dim, 0.0f);
        std::fill(most, most + padded_rows, -INFINITY);
        std::fill(total, total + padded_rows, 0.0f);
        std::fill(cursor, cursor + n, 0);
        for (int64_t tile = 0; tile < length; tile += DENSE_TILE) {
            pack_tile(keys, values, g, tile, std::min(length, tile + DENSE_TILE), scratch);
            tile_masks(sets, n, first, tile, cursor, masks);
            for (int r = 0; r < padded_rows; r += DENSE_ROWS) {
                const uint32_t *of_row[DENSE_ROWS];
                uint32_t any = 0;
                for (int k = 0; k < DENSE_ROWS; k++) {
                    of_row[k] = masks + (int64_t)std::min(r + k, rows - 1) / heads * PANELS;
                    for (int p = 0; p < PANELS; p++) any |= of_row[k][p];
                }
                if (any)
                    dense_rows<P>(q + (int64_t)r * dim, dim, scratch, scale, of_row, most + r, total + r,
                                  out + (int64_t)r * dim);
            }
        }
        for (int i = 0; i < n; i++)
            write_outputs<P>(step, token + i, g * heads, heads, stretch.v.kind == KEYE_INT4, dim,
                             out + (int64_t)i * heads * dim, total + i * heads);
    }
    if (sets && stretch.counts) count_keys(*sets, n, stretch.counts, step.threads > 1);
    clock.add(&Phases::dense);
}

}  // namespace keye
