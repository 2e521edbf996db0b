// Products of few rows with bfloat16 matrices, as in decoding: reading the matrix is what takes the time. Each of its
// numbers comes from memory once for all rows, and is asked for ahead of its use.
//
// Every output is one chain of products over the columns, in an order of its own: it does not depend on the other rows.
#pragma once
#include <vector>
#include "memory.h"
#include "rows.h"
#include "threads.h"

namespace keye {

constexpr int GEMV_OUTPUTS = 8;         // matrix rows that are read side by side
constexpr int GEMV_ROWS = 2;            // rows of x that meet them at once: the sums stay in registers
constexpr int GEMV_AHEAD = 20;          // cache lines by which a matrix row is asked for before it is used
constexpr int LINE_NUMBERS = 32;        // bfloat16 numbers of a cache line: columns are a multiple of it
constexpr int64_t GEMV_SHARE = 128;     // outputs of a matrix that a thread takes at once
constexpr double THREAD_BYTES = 2e6;    // bytes that are worth starting a thread to read

#if defined(KEYE_BF16)
struct GemvOperand {
    using Elem = uint16_t;
    static V madd(V sum, const uint16_t *w, const Elem *x) {
        return BF16::madd(sum, vload((const float *)w), vload((const float *)x));
    }
    static void take(const uint16_t *from, int64_t count, Elem *to) { std::memcpy(to, from, (size_t)count * 2); }
    static void store(Elem *to, V x) { BF16::store(to, x); }
};
#else
struct GemvOperand {
    using Elem = float;
    static V madd(V sum, const uint16_t *w, const Elem *x) {
        for (int i = 0; i < LINE_NUMBERS; i += LANES) sum = vfma(vfrom_bfloat(w + i), vload(x + i), sum);
        return sum;
    }
    static void take(const uint16_t *from, int64_t count, Elem *to) {
        for (int64_t i = 0; i < count; i += LANES) vstore(to + i, vfrom_bfloat(from + i));
    }
    static void store(Elem *to, V x) {
        uint16_t rounded[LANES];
        vto_bfloat(rounded, x);
        vstore(to, vfrom_bfloat(rounded));
    }
};
#endif

// A matrix [outputs, columns], its rows behind one another, and what is added to its products (or null).
struct GemvMatrix {
    const uint16_t *numbers, *bias;
    int64_t columns, outputs;
};

inline void gemv_store(uint16_t *to, float x) { *to = to_bfloat(x); }
inline void gemv_store(float *to, float x) { *to = x; }

// out[row * stride + i] = w[i] . x[row] + bias[i] for OUTPUTS matrix rows and ROWS rows of x.
template <int OUTPUTS, int ROWS, class Out>
inline void gemv_tile(const uint16_t *w, const GemvOperand::Elem *x, int64_t columns, const uint16_t *bias, Out *out,
                      int64_t stride) {
    V sum[ROWS][OUTPUTS];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < OUTPUTS; i++) sum[r][i] = vzero();
    for (int64_t c = 0; c < columns; c += LINE_NUMBERS) {
        // Beyond the end of a matrix row comes the row that the next tile has in its place.
        const int64_t ahead = c + GEMV_AHEAD * LINE_NUMBERS;
        const uint16_t *soon = w + ahead + (ahead < columns ? 0 : (OUTPUTS - 1) * columns);
        for (int i = 0; i < OUTPUTS; i++) {
            _mm_prefetch((const char *)(soon + i * columns), _MM_HINT_T0);
            for (int r = 0; r < ROWS; r++)
                sum[r][i] = GemvOperand::madd(sum[r][i], w + i * columns + c, x + r * columns + c);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < OUTPUTS; i++)
            gemv_store(out + r * stride + i, vsum(sum[r][i]) + (bias ? from_bfloat(bias[i]) : 0.0f));
}

// All rows of x against OUTPUTS matrix rows from `at` on, which stay in the first cache between the passes.
template <int OUTPUTS, class Out>
inline void gemv_rows(const GemvMatrix &matrix, int64_t at, const GemvOperand::Elem *x, int64_t rows, Out *out) {
    const int64_t columns = matrix.columns, stride = matrix.outputs;
    const uint16_t *w = matrix.numbers + at * columns, *bias = matrix.bias ? matrix.bias + at : nullptr;
    out += at;
    int64_t r = 0;
    for (; r + GEMV_ROWS <= rows; r += GEMV_ROWS)
        gemv_tile<OUTPUTS, GEMV_ROWS>(w, x + r * columns, columns, bias, out + r * stride, stride);
    for (; r < rows; r++) gemv_tile<OUTPUTS, 1>(w, x + r * columns, columns, bias, out + r * stride, stride);
}

// Outputs from .. to of `rows` rows x [rows, columns], in out [rows, outputs].
template <class Out>
inline void gemv(const GemvMatrix &matrix, const GemvOperand::Elem *x, int64_t rows, int64_t from, int64_t to, Out *out) {
    for (; from + GEMV_OUTPUTS <= to; from += GEMV_OUTPUTS) gemv_rows<GEMV_OUTPUTS>(matrix, from, x, rows, out);
    for (; from < to; from++) gemv_rows<1>(matrix, from, x, rows, out);
}

inline int gemv_threads(int64_t threads, int64_t numbers) {
    return (int)std::min<double>((double)threads, 1 + 2.0 * (double)numbers / THREAD_BYTES);
}

inline int64_t gemv_shares(int64_t outputs) { return (outputs + GEMV_SHARE - 1) / GEMV_SHARE; }

struct GemvScratch {
    Buffer<GemvOperand::Elem> x, inner;
    Buffer<uint16_t> gate_up, y;
    Buffer<int64_t> row_of_slot;
};

inline int linear(const KeyeLinear &call, GemvScratch &scratch) {
    GemvOperand::Elem *x = scratch.x.get(call.rows * call.columns);
    GemvOperand::take((const uint16_t *)call.x, call.rows * call.columns, x);
    const GemvMatrix matrix{(const uint16_t *)call.weight, (const uint16_t *)call.bias, call.columns, call.outputs};
    return run(gemv_shares(call.outputs), gemv_threads(call.threads, call.columns * call.outputs), [&](int64_t share) {
        const int64_t from = share * GEMV_SHARE, to = std::min(from + GEMV_SHARE, call.outputs);
        if (call.out_dtype == KEYE_FLOAT32) gemv(matrix, x, call.rows, from, to, (float *)call.out);
        else gemv(matrix, x, call.rows, from, to, (uint16_t *)call.out);
    });
}

// silu(gate) * up, rounded to bfloat16 after each of the two, as torch does.
inline void gemv_swiglu(const uint16_t *gate, const uint16_t *up, int64_t count, GemvOperand::Elem *out) {
    for (int64_t i = 0; i < count; i += LANES) {
        const V x = vfrom_bfloat(gate + i), zero = vzero(), one = vset1(1.0f);
        const uint32_t positive = vgreater(x, zero);
        const V e = vexp2(vmul(vselect(positive, vsub(zero, x), x), vset1(1.44269504f)));  // exp(-|x|)
        uint16_t rounded[LANES];
        vto_bfloat(rounded, vmul(x, vdiv(vselect(positive, one, e), vadd(one, e))));
        GemvOperand::store(out + i, vmul(vfrom_bfloat(rounded), vfrom_bfloat(up + i)));
    }
}

// The tokens of one expert: rows start .. start + rows of the sorted ones.
struct ExpertRows {
    int64_t expert, start, rows;
};

// Sorts (token, expert) pairs by expert: the row of each pair in `row_of_slot`.
inline std::vector<ExpertRows> sort_by_expert(const KeyeExperts &call, int64_t *row_of_slot) {
    const int64_t slots = call.tokens * call.top_k;
    std::vector<int64_t> next((size_t)call.experts + 1, 0);
    for (int64_t s = 0; s < slots; s++) next[(size_t)call.chosen[s] + 1]++;
    std::vector<ExpertRows> groups;
    for (int64_t e = 0; e < call.experts; e++) {
        if (next[(size_t)e + 1]) groups.push_back({e, next[(size_t)e], next[(size_t)e + 1]});
        next[(size_t)e + 1] += next[(size_t)e];
    }
    for (int64_t s = 0; s < slots; s++) row_of_slot[s] = next[(size_t)call.chosen[s]]++;
    return groups;
}

// Every token through its experts, weighted and summed.
inline int mix_experts(const KeyeExperts &call, GemvScratch &scratch) {
    const int64_t d = call.width, I = call.inner, slots = call.tokens * call.top_k;
    int64_t *row_of_slot = scratch.row_of_slot.get(slots);
    const std::vector<ExpertRows> groups = sort_by_expert(call, row_of_slot);
    GemvOperand::Elem *x = scratch.x.get(slots * d), *inner = scratch.inner.get(slots * I);
    uint16_t *gate_up = scratch.gate_up.get(slots * 2 * I), *y = scratch.y.get(slots * d);
    for (int64_t s = 0; s < slots; s++)
        GemvOperand::take((const uint16_t *)call.x + s / call.top_k * d, d, x + row_of_slot[s] * d);
    auto each = [&](int64_t outputs, auto work) {
        const int64_t shares = gemv_shares(outputs), count = (int64_t)groups.size() * shares;
        return run(count, gemv_threads(call.threads, count * GEMV_SHARE * d), [&](int64_t item) {
            const int64_t from = item % shares * GEMV_SHARE;
            work(groups[(size_t)(item / shares)], from, std::min(from + GEMV_SHARE, outputs));
        });
    };
    if (each(I, [&](const ExpertRows &group, int64_t from, int64_t to) {
            const char *numbers = (const char *)call.gate_up + group.expert * call.gate_up_bytes;
            const GemvMatrix matrix{(const uint16_t *)numbers, nullptr, d, 2 * I};
            uint16_t *out = gate_up + group.start * 2 * I;
            gemv(matrix, x + group.start * d, group.rows, from, to, out);
            gemv(matrix, x + group.start * d, group.rows, I + from, I + to, out);
            for (int64_t r = 0; r < group.rows; r++)
                gemv_swiglu(out + r * 2 * I + from, out + r * 2 * I + I + from, to - from,
                            inner + (group.start + r) * I + from);
        }))
        return 1;
    if (each(d, [&](const ExpertRows &group, int64_t from, int64_t to) {
            const char *numbers = (const char *)call.down + group.expert * call.down_bytes;
            const GemvMatrix matrix{(const uint16_t *)numbers, nullptr, I, d};
            gemv(matrix, inner + group.start * I, group.rows, from, to, y + group.start * d);
        }))
        return 1;
    for (int64_t t = 0; t < call.tokens; t++)
        for (int64_t i = 0; i < d; i += LANES) {
            V sum = vzero();
            for (int64_t s = t * call.top_k; s < (t + 1) * call.top_k; s++) {
                const V weight = vset1(from_bfloat(to_bfloat(call.weights[s])));
                sum = vadd(sum, vmul(weight, vfrom_bfloat(y + row_of_slot[s] * d + i)));
            }
            vto_bfloat((uint16_t *)call.out + t * d + i, sum);
        }
    return 0;
}

}  // namespace keye
