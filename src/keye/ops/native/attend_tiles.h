// The two products of sparse attention by AMX tiles. Rows are apart and tiles want them at a fixed distance, so a batch
// of rows is copied first; that is cheaper than what it saves.
//
// The processor sums the 32 keys of a tile before it adds them, so a sum depends on where batches begin. Stretches that
// ask for fixed results do not come here.
#pragma once
#include "memory.h"
#include "tiles.h"
#if defined(KEYE_AMX)

namespace keye {

// Queries of one group as panels: units of up to 16 heads side by side, zeros for the heads that lack.
inline void pack_heads(const uint16_t *q, int heads, int dim, float *panels) {
    alignas(64) static const uint16_t zeros[MAX_DIM] = {};
    for (int h = 0; h < heads; h += TILE_SIDE, panels += dim / 2 * TILE_SIDE) {
        const float *rows[TILE_SIDE];
        for (int i = 0; i < TILE_SIDE; i++) rows[i] = (const float *)(h + i < heads ? q + (int64_t)(h + i) * dim : zeros);
        pack_panel(rows, dim / 2, panels);
    }
}

// Logits as dot_heads gives them. `staging` has room for 32 rows.
inline void tile_dot(const float *panels, int heads, int dim, const uint16_t *const *rows, int count, V scale, float *out,
                     int64_t stride, uint16_t *staging) {
    const int units = dim / 2;
    for (int i = 0; i < count; i += 2 * TILE_SIDE) {
        const bool both = count - i > TILE_SIDE;
        for (int k = 0; k < (both ? 2 : 1) * TILE_SIDE; k++)
            std::memcpy(staging + k * dim, rows[i + k], (size_t)dim * 2);
        for (int h = 0; h < heads; h += TILE_SIDE) {
            const float *panel = panels + (int64_t)h * units;
            tile_zero<0>();
            tile_zero<1>();
            for (int u = 0; u < units; u += TILE_SIDE) {
                tile_load<6>(panel + u * TILE_SIDE, 64);
                tile_load<4>(staging + 2 * u, dim * 2);
                tile_product<0, 4, 6>();
                if (both) {
                    tile_load<5>(staging + TILE_SIDE * dim + 2 * u, dim * 2);
                    tile_product<1, 5, 6>();
                }
            }
            alignas(64) float product[2][TILE_SIDE * TILE_SIDE];
            tile_store<0>(product[0], 64);
            tile_store<1>(product[1], 64);
            for (int b = 0; b < (both ? 2 : 1); b++) {
                V lanes[LANES];
                for (int r = 0; r < LANES; r++) lanes[r] = vload(product[b] + r * LANES);
                vtranspose(lanes);
                for (int r = 0; r < std::min(TILE_SIDE, heads - h); r++)
                    vstore(out + (h + r) * stride + i + b * TILE_SIDE, vmul(lanes[r], scale));
            }
        }
    }
}

// Sums as add_values_heads gives them; `steps` pairs of keys. Weights and sums have whole tiles of heads that may be read
// and written, and weights are finite up to a multiple of 16 steps. `staging` has room for these.
inline void tile_add(const float *weights, int64_t stride, int heads, const uint16_t *const *rows, int steps, int dim,
                     float *out, float *staging) {
    const int padded = (int)round_up(steps, TILE_SIDE);
    for (int s = 0; s < padded; s++)
        for (int d = 0; d < dim; d += 2 * LANES) {
            V x = vzero(), y = vzero();
            if (s < steps) BF16::expand(rows + 2 * s, d, &x, &y);
            float *to = staging + (int64_t)d * padded + s * 2 * LANES;
            vstore(to, x);
            vstore(to + LANES, y);
        }
    for (int h = 0; h < heads; h += TILE_SIDE)
        for (int d = 0; d < dim; d += 2 * LANES) {
            float *sums = out + (int64_t)h * dim + d;
            tile_load<0>(sums, (int64_t)dim * 4);
            tile_load<1>(sums + LANES, (int64_t)dim * 4);
            for (int s = 0; s < padded; s += TILE_SIDE) {
                const float *values = staging + (int64_t)d * padded + s * 2 * LANES;
                tile_load<4>(weights + h * stride + s, stride * 4);
                tile_load<6>(values, 2 * LANES * 4);
                tile_product<0, 4, 6>();
                tile_load<7>(values + LANES, 2 * LANES * 4);
                tile_product<1, 4, 7>();
            }
            tile_store<0>(sums, (int64_t)dim * 4);
            tile_store<1>(sums + LANES, (int64_t)dim * 4);
        }
}

}  // namespace keye
#endif
