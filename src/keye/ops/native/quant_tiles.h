// Products of quantised weights by AMX tiles of int8: 32 rows against one pair of 16 outputs, 64 columns at a time.
#pragma once
#if defined(KEYE_AMX)
#include "quant.h"
#include "tiles.h"

namespace keye {

constexpr int AMX_ROWS = 32;
constexpr int AMX_FROM = 12;  // rows from which the tiles are filled well enough

#if defined(KEYE_AMX_EMULATE)

// Tile C += A x B of signed times unsigned bytes, four products to an int32.
template <int C, int A, int B> inline void tile_product_bytes() {
    for (int r = 0; r < TILE_SIDE; r++)
        for (int n = 0; n < TILE_SIDE; n++) {
            int32_t sum = (int32_t)tile_file.unit[C][r][n];
            for (int k = 0; k < TILE_SIDE; k++)
                for (int i = 0; i < 4; i++)
                    sum += (int8_t)(tile_file.unit[A][r][k] >> 8 * i) * (int)(uint8_t)(tile_file.unit[B][k][n] >> 8 * i);
            tile_file.unit[C][r][n] = (uint32_t)sum;
        }
}

#else

template <int C, int A, int B> inline void tile_product_bytes() {
    static_assert(C < 4 && A == 4 + C / 2 && B == 6 + C % 2, "no such product is written out");
    if constexpr (C == 0) asm volatile("tdpbsud %%tmm6, %%tmm4, %%tmm0" ::: "memory");
    if constexpr (C == 1) asm volatile("tdpbsud %%tmm7, %%tmm4, %%tmm1" ::: "memory");
    if constexpr (C == 2) asm volatile("tdpbsud %%tmm6, %%tmm5, %%tmm2" ::: "memory");
    if constexpr (C == 3) asm volatile("tdpbsud %%tmm7, %%tmm5, %%tmm3" ::: "memory");
}

#endif

// Lines of one step as two tiles of 16 rows: four columns of 16 outputs in each.
inline void unpack_lines(int bits, const char *block, uint8_t (*b)[TILE_SIDE][64]) {
    for (int i = 0; i < TILE_SIDE; i++)
        for (int c = 0; c < 2; c++) {
            if (bits == 8) {
                std::memcpy(b[c][i], block + 128 * i + 64 * c, 64);
                continue;
            }
            const Line line = lload(block + 128 * (i / 2) + 64 * c);
            _mm512_store_si512(b[c][i], i % 2 ? lhigh(line) : llow(line));
        }
}

// Up to 32 rows against one pair, for steps of 64 columns: sums [count][32], the same numbers as without tiles.
inline void product_by_tiles(const Layout &layout, const char *block, const Group *const *rows, int count, float *out) {
    alignas(64) int8_t a[AMX_ROWS][64];
    alignas(64) uint8_t b[2][TILE_SIDE][64];
    alignas(64) int32_t sums[4][TILE_SIDE][TILE_SIDE];
    std::fill(out, out + (int64_t)count * PAIR_OUTPUTS, 0.0f);
    for (int64_t s = 0; s < layout.steps; s++, block += layout.block_bytes) {
        for (int r = 0; r < AMX_ROWS; r++) std::memcpy(a[r], rows[std::min(r, count - 1)][s].codes, 64);
        unpack_lines(layout.bits, block, b);
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        tile_load<4>(a, 64), tile_load<5>(a + TILE_SIDE, 64), tile_load<6>(b[0], 64), tile_load<7>(b[1], 64);
        tile_product_bytes<0, 4, 6>(), tile_product_bytes<1, 4, 7>();
        tile_product_bytes<2, 5, 6>(), tile_product_bytes<3, 5, 7>();
        tile_store<0>(sums[0], 64), tile_store<1>(sums[1], 64), tile_store<2>(sums[2], 64), tile_store<3>(sums[3], 64);
        const char *scales = block + layout.code_bytes, *minima = scales + PAIR_OUTPUTS * layout.scale_bytes;
        for (int c = 0; c < 2; c++) {
            const int64_t at = 16 * c * layout.scale_bytes;
            const F16 scale = load_scales(layout.scale_kind, scales + at);
            const F16 minimum = layout.has_minimum ? load_scales(layout.scale_kind, minima + at) : fzero();
            for (int r = 0; r < count; r++) {
                const Group &group = rows[r][s];
                const I16 codes = lload(sums[2 * (r / TILE_SIDE) + c][r % TILE_SIDE]);
                const I16 exact = _mm512_sub_epi32(codes, iset1(layout.offset() * group.sums[4]));
                float *to = out + PAIR_OUTPUTS * r + 16 * c;
                F16 total = fmadd(ffrom_int(exact), fmul(scale, fset1(group.scale)), fload(to));
                if (layout.has_minimum) total = fmadd(minimum, fset1((float)group.sums[4] * group.scale), total);
                fstore(to, total);
            }
        }
    }
}

}  // namespace keye
#endif
