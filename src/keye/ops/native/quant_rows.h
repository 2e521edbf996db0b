// Rows of a product: their rounding, and how they are shared out among threads.
#pragma once
#include "quant_product.h"
#include "threads.h"

namespace keye {

constexpr int64_t PART_ROWS = 2048;   // rows or tokens that are computed at once: what bounds the scratch
constexpr int64_t ROW_BLOCK = 192;    // rows whose activations stay in the cache while weights pass
constexpr double THREAD_WORK = 2e6;   // bytes of weights, or 64 multiplications each, that are worth starting a thread for

struct QuantScratch {
    Buffer<Group> rows, inner;
    Buffer<const Group *> places;
    Buffer<float> sums, some, factors;
    Buffer<int64_t> tokens;
};

// Static, since variables inside of inline functions are one for all libraries of a process.
static QuantScratch &quant_scratch() {
    thread_local QuantScratch scratch;
    return scratch;
}

inline int worth_threads(int threads, double rows, double weights) {
    const double work = weights * std::max(1.0, rows / 16);
    return (int)std::min<double>(threads, 1 + work / THREAD_WORK);
}

// Rows of one matrix that are computed together: activations begin .. begin + count, outputs likewise.
struct RowBlock {
    int64_t matrix, begin;
    int count;
};

inline std::vector<RowBlock> cut_rows(const int64_t *sizes, int64_t matrices) {
    std::vector<RowBlock> blocks;
    for (int64_t matrix = 0, begin = 0; matrix < matrices; begin += sizes[matrix++]) {
        const int64_t parts = divide_up(sizes[matrix], ROW_BLOCK);
        for (int64_t p = 0, at = 0; p < parts; p++) {
            const int64_t some = (sizes[matrix] - at + parts - p - 1) / (parts - p);
            blocks.push_back({matrix, begin + at, (int)some});
            at += some;
        }
    }
    return blocks;
}

// Rounds rows of activations, several a time.
inline int quantize_rows(int32_t dtype, const void *x, int64_t rows, int64_t inner, int threads, Group *to) {
    constexpr int64_t SOME = 16;
    const int64_t groups = divide_up(inner, GROUP);
    return run(divide_up(rows, SOME), rows > 4 * SOME ? threads : 1, [&](int64_t item) {
        for (int64_t r = item * SOME; r < std::min(rows, (item + 1) * SOME); r++)
            quantize_row(dtype, x, r * inner, inner, to + r * groups);
    });
}

}  // namespace keye
