// Products of quantised weights with rounded activations: one pair of 16 outputs against any number of rows.
#pragma once
#include "quant.h"
#include "quant_tiles.h"

namespace keye {

constexpr int AHEAD = 8192;  // bytes by which weights are asked for before they are needed

// ROWS rows against one pair: sums [ROWS][32]. `fetch` reads ahead, which pays where the weights come from memory; they are
// not worth a place in the caches that are kept for longer.
//
// STAGE columns (16, or 32 twice in steps of 64) are summed as integers without a look at anything else.
template <int BITS, int STAGE, int ROWS>
inline void product_tile(const Layout &layout, const char *block, const Group *const *rows, bool fetch, float *out) {
    constexpr int COLUMNS = BITS == 4 ? 8 : 4;  // of a line
    const int quarters = layout.step / 16, stages = layout.step / STAGE, offset = layout.offset();
    F16 total[ROWS][2];
    for (int r = 0; r < ROWS; r++) total[r][0] = total[r][1] = fzero();
    const Group *group[ROWS];
    for (int r = 0; r < ROWS; r++) group[r] = rows[r];
    int next = quarters;  // of the group, behind this step
    for (int64_t s = 0; s < layout.steps; s++, block += layout.block_bytes) {
        if (fetch)
            for (int at = 0; at < layout.block_bytes; at += 64) __builtin_prefetch(block + AHEAD + at, 0, 0);
        I16 sums[ROWS][2];
        for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = iset1(-offset * (group[r]->sums[next] - group[r]->sums[next - quarters]));
        const char *line = block;
        for (int i = 0; i < stages; i++) {
            const int first = 16 * (next - quarters) + i * STAGE;
            Stage<BITS> stage[ROWS][2];
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < 2; c++) stage[r][c].begin(sums[r][c]);
#pragma GCC unroll 8
            for (int k = 0; k < STAGE; k += COLUMNS, line += 128) {
                Line a = lload(line), b = lload(line + 64);
                Line low_a = a, low_b = b;
                if (BITS == 4) low_a = llow(a), low_b = llow(b);
                for (int r = 0; r < ROWS; r++) {
                    int32_t x;
                    std::memcpy(&x, group[r]->codes + first + k, 4);
                    stage[r][0].add(low_a, iset1(x));
                    stage[r][1].add(low_b, iset1(x));
                }
                if (BITS == 4) {
                    a = lhigh(a), b = lhigh(b);
                    for (int r = 0; r < ROWS; r++) {
                        int32_t x;
                        std::memcpy(&x, group[r]->codes + first + k + 4, 4);
                        stage[r][0].add(a, iset1(x));
                        stage[r][1].add(b, iset1(x));
                    }
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < 2; c++) sums[r][c] = stage[r][c].end(sums[r][c]);
        }
        const char *scales = block + layout.code_bytes;
        for (int c = 0; c < 2; c++) {
            const F16 scale = load_scales(layout.scale_kind, scales + 16 * c * layout.scale_bytes);
            for (int r = 0; r < ROWS; r++)
                total[r][c] = fmadd(ffrom_int(sums[r][c]), fmul(scale, fset1(group[r]->scale)), total[r][c]);
        }
        if (layout.has_minimum) {
            const char *minima = scales + PAIR_OUTPUTS * layout.scale_bytes;
            for (int r = 0; r < ROWS; r++) {
                const F16 sum = fset1((float)(group[r]->sums[next] - group[r]->sums[next - quarters]) * group[r]->scale);
                for (int c = 0; c < 2; c++)
                    total[r][c] = fmadd(load_scales(layout.scale_kind, minima + 16 * c * layout.scale_bytes), sum, total[r][c]);
            }
        }
        next += quarters;
        if (next > 4) {
            next = quarters;
            for (int r = 0; r < ROWS; r++) group[r]++;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 2; c++) fstore(out + PAIR_OUTPUTS * r + 16 * c, total[r][c]);
}

template <int BITS, int STAGE, int ROWS = TILE_ROWS>
inline void product_rows(const Layout &layout, const char *block, const Group *const *rows, int count, bool fetch, float *out) {
    if constexpr (ROWS > 1) {
        if (count < ROWS) {
            product_rows<BITS, STAGE, ROWS - 1>(layout, block, rows, count, fetch, out);
            return;
        }
    }
    product_tile<BITS, STAGE, ROWS>(layout, block, rows, fetch, out);
}

// All rows against one pair. `sink(first, count, sums)` takes the sums [count][32] of some rows.
template <class Sink>
inline void product_pair(const Layout &layout, const char *block, const Group *const *rows, int64_t count, Sink sink) {
#if defined(KEYE_AMX)
    if (layout.step == GROUP && count >= AMX_FROM) {
        alignas(64) float sums[AMX_ROWS * PAIR_OUTPUTS];
        tile_begin();
        for (int64_t at = 0; at < count; at += AMX_ROWS) {
            const int some = (int)std::min<int64_t>(AMX_ROWS, count - at);
            product_by_tiles(layout, block, rows + at, some, sums);
            sink(at, some, sums);
        }
        return;
    }
#endif
    alignas(64) float out[TILE_ROWS * PAIR_OUTPUTS];
    const int64_t tiles = divide_up(count, TILE_ROWS);
    for (int64_t t = 0, at = 0; t < tiles; t++) {
        const int some = (int)((count - at + tiles - t - 1) / (tiles - t));  // as even as possible
        const bool fetch = t == 0;  // later rows find the weights in the cache
        if (layout.step == 16 && layout.bits == 4) product_rows<4, 16>(layout, block, rows + at, some, fetch, out);
        else if (layout.step == 16) product_rows<8, 16>(layout, block, rows + at, some, fetch, out);
        else if (layout.bits == 4) product_rows<4, 32>(layout, block, rows + at, some, fetch, out);
        else product_rows<8, 32>(layout, block, rows + at, some, fetch, out);
        sink(at, some, out);
        at += some;
    }
}

}  // namespace keye
