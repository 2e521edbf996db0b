// AMX tiles: the eight two-dimensional registers and their bfloat16 product, or the same in plain C.
//
// KEYE_AMX_EMULATE gives the plain version, with which tests run the code paths on any processor. Instructions are
// inline assembly with a memory clobber: gcc 12 declares only 8 of the 64 bytes that _tile_loadconfig reads, and nothing
// else would keep the compiler from moving ordinary loads and stores across those of tiles.
#pragma once
#if defined(KEYE_AMX)
#include <cstring>
#include "rows.h"
#if !defined(KEYE_AMX_EMULATE)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace keye {

constexpr int TILE_SIDE = 16;   // rows, and units of four bytes in a row

#if defined(KEYE_AMX_EMULATE)

struct TileFile {
    uint32_t unit[8][TILE_SIDE][TILE_SIDE];
};
inline thread_local TileFile tile_file;

inline void tile_begin() {}

template <int T> inline void tile_zero() { std::memset(tile_file.unit[T], 0, sizeof(tile_file.unit[T])); }
template <int T> inline void tile_load(const void *from, int64_t stride) {
    for (int r = 0; r < TILE_SIDE; r++) std::memcpy(tile_file.unit[T][r], (const char *)from + r * stride, 64);
}
template <int T> inline void tile_store(void *to, int64_t stride) {
    for (int r = 0; r < TILE_SIDE; r++) std::memcpy((char *)to + r * stride, tile_file.unit[T][r], 64);
}
// Tile C += A x B: even and odd elements are summed apart and then added, as the processor does.
template <int C, int A, int B> inline void tile_product() {
    for (int r = 0; r < TILE_SIDE; r++)
        for (int n = 0; n < TILE_SIDE; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < TILE_SIDE; k++) {
                uint32_t a = tile_file.unit[A][r][k], b = tile_file.unit[B][k][n];
                even = std::fma(from_bfloat((uint16_t)a), from_bfloat((uint16_t)b), even);
                odd = std::fma(from_bfloat((uint16_t)(a >> 16)), from_bfloat((uint16_t)(b >> 16)), odd);
            }
            std::memcpy(&sum, &tile_file.unit[C][r][n], 4);
            sum += even + odd;
            std::memcpy(&tile_file.unit[C][r][n], &sum, 4);
        }
}

#else

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Makes all tiles 16 x 64 bytes. To be called at every entry of a kernel: other libraries release tiles behind us.
// Linux grants tiles to a process on request (ARCH_REQ_XCOMP_PERM for XTILEDATA); asking again costs nothing that counts.
inline void tile_begin() {
    thread_local bool asked = false;
    if (!asked) {
        syscall(SYS_arch_prctl, 0x1023, 18);
        asked = true;
    }
    static const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

// Tile numbers are part of the instruction, so each is written out.
#define KEYE_TILES(CASE) CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)

template <int T> inline void tile_zero() {
#define KEYE_CASE(N) if constexpr (T == N) asm volatile("tilezero %%tmm" #N ::: "memory");
    KEYE_TILES(KEYE_CASE)
#undef KEYE_CASE
}
template <int T> inline void tile_load(const void *from, int64_t stride) {
#define KEYE_CASE(N) \
    if constexpr (T == N) asm volatile("tileloadd (%0,%1,1), %%tmm" #N ::"r"(from), "r"(stride) : "memory");
    KEYE_TILES(KEYE_CASE)
#undef KEYE_CASE
}
template <int T> inline void tile_store(void *to, int64_t stride) {
#define KEYE_CASE(N) \
    if constexpr (T == N) asm volatile("tilestored %%tmm" #N ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory");
    KEYE_TILES(KEYE_CASE)
#undef KEYE_CASE
}
// Tile C += A x B, for the operands that the kernels use: sums in 0 .. 3, A in 4 or 5, B in 6 or 7.
template <int C, int A, int B> inline void tile_product() {
    static_assert(C < 4 && (A == 4 || A == 5) && (B == 6 || B == 7), "no such product is written out");
#define KEYE_CASE(N)                                                                                           \
    if constexpr (C == N && A == 4 && B == 6) asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm" #N ::: "memory"); \
    if constexpr (C == N && A == 4 && B == 7) asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm" #N ::: "memory"); \
    if constexpr (C == N && A == 5 && B == 6) asm volatile("tdpbf16ps %%tmm6, %%tmm5, %%tmm" #N ::: "memory"); \
    if constexpr (C == N && A == 5 && B == 7) asm volatile("tdpbf16ps %%tmm7, %%tmm5, %%tmm" #N ::: "memory");
    KEYE_CASE(0) KEYE_CASE(1) KEYE_CASE(2) KEYE_CASE(3)
#undef KEYE_CASE
}

#endif

// 16 rows of A times 3 panels of 16 columns: tiles 0, 1 and 2. Operands have `units` units, a multiple of 16.
inline void tile_panels(const float *a, int units, const float *panels) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    for (int u = 0; u < units; u += TILE_SIDE) {
        const float *b = panels + u * TILE_SIDE;
        const int64_t panel = (int64_t)units * TILE_SIDE;
        tile_load<4>(a + u, (int64_t)units * 4);
        tile_load<6>(b, 64);
        tile_product<0, 4, 6>();
        tile_load<7>(b + panel, 64);
        tile_product<1, 4, 7>();
        tile_load<6>(b + 2 * panel, 64);
        tile_product<2, 4, 6>();
    }
}

}  // namespace keye
#endif
