// Quantised weights as the products read them, and activations rounded to int8.
//
// Packed weights: outputs are taken in pairs of 16, columns in steps of 16, 32 or 64. A block holds one step of one pair of
// 16: lines of 64 bytes (four columns of 16 outputs each; of int4 two such lines in the halves of its bytes, the first in
// the low ones), those of the first and the second 16 outputs in turn, then 32 scales, then 32 minima where there are
// any. Blocks of a pair follow one another, so that a product reads memory from its beginning to its end.
#pragma once
#include "keye.h"
#include "memory.h"
#include "quant_simd.h"

namespace keye {

constexpr int PAIR_OUTPUTS = 32;
constexpr int GROUP = 64;  // activations that share a scale

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Where things are in packed weights.
struct Layout {
    int bits, step, scale_kind, scale_bytes, code_bytes, block_bytes;
    bool has_minimum;
    int64_t steps, pairs, matrix_bytes;

    explicit Layout(const KeyeQuant &w)
        : bits(w.bits), step(w.step), scale_kind(w.scale_kind), scale_bytes(w.scale_kind == KEYE_FLOAT32 ? 4 : 2),
          code_bytes(PAIR_OUTPUTS * w.step * w.bits / 8),
          block_bytes(code_bytes + PAIR_OUTPUTS * scale_bytes * (w.has_minimum ? 2 : 1)), has_minimum(w.has_minimum),
          steps(divide_up(w.inner, w.step)), pairs(divide_up(w.outputs, PAIR_OUTPUTS)),
          matrix_bytes(pairs * steps * block_bytes) {}

    // What codes are stored too large by: a product subtracts it times the sum of its activations.
    int offset() const { return bits == 8 ? INT8_OFFSET : has_minimum ? 0 : 8; }
    const char *pair(const KeyeQuant &w, int64_t matrix, int64_t pair) const {
        return (const char *)w.data + matrix * matrix_bytes + pair * steps * block_bytes;
    }
};

// 64 activations: codes, their scale, and the sums of the first 0, 16, 32, 48 and 64 codes.
struct Group {
    int8_t codes[GROUP];
    float scale;
    int16_t sums[5];
};
static_assert(sizeof(Group) == 80, "groups of a row lie behind one another");

inline F16 load_scales(int kind, const char *at) {
    if (kind == KEYE_BFLOAT16) return ffrom_bfloat((const uint16_t *)at);
    if (kind == KEYE_FLOAT16) return ffrom_half((const uint16_t *)at);
    return fload((const float *)at);
}

inline void store_outputs(int32_t dtype, void *to, int64_t offset, int count, const float *x) {
    if (count == PAIR_OUTPUTS) {
        store_plain(dtype, to, offset, count, x);
        return;
    }
    alignas(64) char last[PAIR_OUTPUTS * 4];
    const int64_t size = dtype == KEYE_FLOAT32 ? 4 : 2;
    store_plain(dtype, last, 0, PAIR_OUTPUTS, x);
    std::memcpy((char *)to + offset * size, last, (size_t)(count * size));
}

// Rounds 64 numbers to int8 with one scale, the largest magnitude over 127. Numbers that are not finite make the scale
// NaN, and with it every output.
inline void quantize_group(const float *x, Group &group) {
    F16 part[4], largest = fzero(), bad = fzero();
    for (int i = 0; i < 4; i++) {
        part[i] = fload(x + 16 * i);
        largest = flarger(part[i], largest);
        bad = fmadd(part[i], fzero(), bad);
    }
    const float most = flargest(largest);
    const F16 factor = fset1(most > 1e-30f ? 127.0f / most : 0.0f);
    for (int i = 0; i < 4; i++) fstore_codes(group.codes + 16 * i, fmul(part[i], factor));
    group.scale = most / 127.0f + fsum(bad);
    group.sums[0] = 0;
    for (int quarter = 0; quarter < 4; quarter++) {
        int32_t sum = group.sums[quarter];
        for (int i = 0; i < 16; i++) sum += group.codes[16 * quarter + i];
        group.sums[quarter + 1] = (int16_t)sum;
    }
}

// One row of `inner` activations; zeros follow the last.
inline void quantize_row(int32_t dtype, const void *x, int64_t offset, int64_t inner, Group *groups) {
    alignas(64) float some[GROUP];
    for (int64_t at = 0; at < inner; at += GROUP, groups++) {
        const int count = (int)std::min<int64_t>(GROUP, inner - at);
        if (count == GROUP) {
            load_plain(dtype, x, offset + at, GROUP, some);
        } else {
            alignas(64) char last[GROUP * 4] = {};
            const int64_t size = dtype == KEYE_FLOAT32 ? 4 : 2;
            std::memcpy(last, (const char *)x + (offset + at) * size, (size_t)(count * size));
            load_plain(dtype, last, 0, GROUP, some);
        }
        quantize_group(some, *groups);
    }
}

// Turns the canonical codes and scales of one pair of one matrix into the packed layout, and back.
struct Packer {
    const KeyeQuant &w;
    const KeyeQuantSource &file;
    const Layout layout;
    Packer(const KeyeQuant &weight, const KeyeQuantSource &canonical) : w(weight), file(canonical), layout(weight) {}

    void pack(int64_t matrix, int64_t pair) const {
        alignas(64) uint8_t rows[PAIR_OUTPUTS][64];
        char *block = const_cast<char *>(layout.pair(w, matrix, pair));
        for (int64_t s = 0; s < layout.steps; s++, block += layout.block_bytes) {
            for (int o = 0; o < PAIR_OUTPUTS; o++) {
                const int count = columns(pair * PAIR_OUTPUTS + o, s);
                std::memset(rows[o] + count, layout.offset(), (size_t)(layout.step - count));  // neutral
                if (count) read_codes(place(matrix, pair * PAIR_OUTPUTS + o, s), count, rows[o]);
            }
            uint8_t *line = (uint8_t *)block;
            for (int k = 0; k < layout.step; k += layout.bits == 8 ? 4 : 8)
                for (int o = 0; o < PAIR_OUTPUTS; o++, line += 4) {
                    uint32_t low, high = 0;
                    std::memcpy(&low, rows[o] + k, 4);
                    if (layout.bits == 4) std::memcpy(&high, rows[o] + k + 4, 4);
                    low |= high << 4;
                    std::memcpy(line, &low, 4);
                }
            move_scales(matrix, pair, s, (char *)line, (char *)file.scales, true);
            if (layout.has_minimum)
                move_scales(matrix, pair, s, (char *)line + PAIR_OUTPUTS * layout.scale_bytes, (char *)file.minima, true);
        }
    }

    void unpack(int64_t matrix, int64_t pair) const {
        alignas(64) uint8_t rows[PAIR_OUTPUTS][64];
        char *block = const_cast<char *>(layout.pair(w, matrix, pair));
        for (int64_t s = 0; s < layout.steps; s++, block += layout.block_bytes) {
            const uint8_t *line = (const uint8_t *)block;
            for (int k = 0; k < layout.step; k += layout.bits == 8 ? 4 : 8)
                for (int o = 0; o < PAIR_OUTPUTS; o++, line += 4) {
                    uint32_t codes, low, high;
                    std::memcpy(&codes, line, 4);
                    low = layout.bits == 8 ? codes : codes & 0x0f0f0f0f;
                    high = codes >> 4 & 0x0f0f0f0f;
                    std::memcpy(rows[o] + k, &low, 4);
                    if (layout.bits == 4) std::memcpy(rows[o] + k + 4, &high, 4);
                }
            for (int o = 0; o < PAIR_OUTPUTS; o++)
                if (const int count = columns(pair * PAIR_OUTPUTS + o, s))
                    write_codes(rows[o], count, place(matrix, pair * PAIR_OUTPUTS + o, s));
            move_scales(matrix, pair, s, (char *)line, (char *)file.scales, false);
            if (layout.has_minimum)
                move_scales(matrix, pair, s, (char *)line + PAIR_OUTPUTS * layout.scale_bytes, (char *)file.minima, false);
        }
    }

  private:
    // Columns of output m that a step has.
    int columns(int64_t m, int64_t step) const {
        return m < w.outputs ? (int)std::min<int64_t>(layout.step, w.inner - step * layout.step) : 0;
    }

    // The canonical codes of output m from the first column of a step on.
    uint8_t *place(int64_t matrix, int64_t m, int64_t step) const {
        const int64_t per_byte = layout.bits == 8 ? 1 : 2, row = matrix * w.outputs + m;
        return (uint8_t *)file.codes + row * divide_up(w.inner, per_byte) + step * layout.step / per_byte;
    }

    // A byte for each column, as products read them.
    void read_codes(const uint8_t *from, int count, uint8_t *to) const {
        if (layout.bits == 8) {
            for (int k = 0; k < count; k++) to[k] = (uint8_t)(from[k] + INT8_OFFSET);
            return;
        }
        for (int k = 0; k < count / 2; k++) {
            to[2 * k] = from[k] & 15;
            to[2 * k + 1] = from[k] >> 4;
        }
        if (count & 1) to[count - 1] = from[count / 2] & 15;
    }

    void write_codes(const uint8_t *from, int count, uint8_t *to) const {
        if (layout.bits == 8) {
            for (int k = 0; k < count; k++) to[k] = (uint8_t)(from[k] - INT8_OFFSET);
            return;
        }
        for (int k = 0; k < count / 2; k++) to[k] = (uint8_t)(from[2 * k] | from[2 * k + 1] << 4);
        if (count & 1) to[count / 2] = from[count - 1];
    }

    // 32 scales or minima of a step between a block and the canonical ones.
    void move_scales(int64_t matrix, int64_t pair, int64_t step, char *block, char *all, bool into_block) const {
        const int64_t group = step * layout.step / file.group, size = layout.scale_bytes;
        for (int o = 0; o < PAIR_OUTPUTS; o++, block += size) {
            const int64_t m = pair * PAIR_OUTPUTS + o;
            char *at = all + ((matrix * w.outputs + m) * file.groups + group) * size;
            if (m >= w.outputs) std::memset(block, 0, into_block ? (size_t)size : 0);
            else if (into_block) std::memcpy(block, at, (size_t)size);
            else std::memcpy(at, block, (size_t)size);
        }
    }
};

}  // namespace keye
