// Entry points of products with quantised weights: round the activations, share pairs of outputs out among threads.
#include "quant_experts.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace keye;

namespace {

int quant_matmul(const KeyeQuant &w, const KeyeQuantRows &call) {
    const Layout layout(w);
    const int64_t all[] = {call.rows}, groups = divide_up(w.inner, GROUP);
    const std::vector<RowBlock> blocks = cut_rows(call.sizes ? call.sizes : all, call.sizes ? w.matrices : 1);
    if (blocks.empty()) return 0;
    QuantScratch &scratch = quant_scratch();
    Group *rows = scratch.rows.get(call.rows * groups);
    const Group **places = scratch.places.get(call.rows);
    if (quantize_rows(call.dtype, call.x, call.rows, w.inner, call.threads, rows)) return 1;
    for (int64_t r = 0; r < call.rows; r++) places[r] = rows + r * groups;
    const double read = (double)layout.matrix_bytes * (double)blocks.size();
    const int threads = worth_threads(call.threads, (double)call.rows / (double)blocks.size(), read);
    const int64_t parts = threads == 1 ? 1 : std::min<int64_t>(layout.pairs, divide_up(8 * threads, (int64_t)blocks.size()));
    return run((int64_t)blocks.size() * parts, threads, [&](int64_t item) {
        const RowBlock &block = blocks[item / parts];
        const int64_t part = item % parts;
        for (int64_t pair = layout.pairs * part / parts; pair < layout.pairs * (part + 1) / parts; pair++) {
            const int outputs = (int)std::min<int64_t>(PAIR_OUTPUTS, w.outputs - pair * PAIR_OUTPUTS);
            product_pair(layout, layout.pair(w, block.matrix, pair), places + block.begin, block.count,
                         [&](int64_t first, int count, float *sums) {
                for (int r = 0; r < count; r++, sums += PAIR_OUTPUTS) {
                    if (call.bias)
                        for (int o = 0; o < outputs; o++) sums[o] += call.bias[pair * PAIR_OUTPUTS + o];
                    const int64_t row = block.begin + first + r;
                    store_outputs(call.dtype, call.out, row * w.outputs + pair * PAIR_OUTPUTS, outputs, sums);
                }
            });
        }
    });
}

// Rows of one matrix, some thousand at a time: that bounds the scratch.
int quant_matmul_in_parts(const KeyeQuant &w, KeyeQuantRows call) {
    if (call.sizes) return quant_matmul(w, call);
    const int64_t size = call.dtype == KEYE_FLOAT32 ? 4 : 2;
    for (int64_t left = call.rows; left > 0; left -= call.rows) {
        call.rows = std::min(left, PART_ROWS);
        if (quant_matmul(w, call)) return 1;
        call.x = (const char *)call.x + call.rows * w.inner * size;
        call.out = (char *)call.out + call.rows * w.outputs * size;
    }
    return 0;
}

int quant_pack(const KeyeQuant &w, const KeyeQuantSource &from) {
    const Packer packer(w, from);
#if defined(__linux__)
    // Reading from end to end is faster over large pages, and so is writing for the first time.
    const int64_t page = 4096, begin = divide_up((int64_t)w.data, page) * page;
    const int64_t bytes = (int64_t)w.data + packer.layout.matrix_bytes * w.matrices - begin;
    if (bytes > 2 << 20) madvise((void *)begin, (size_t)bytes, MADV_HUGEPAGE);
#endif
    return run(w.matrices * packer.layout.pairs, from.threads, [&](int64_t item) {
        packer.pack(item / packer.layout.pairs, item % packer.layout.pairs);
    });
}

int quant_unpack(const KeyeQuant &w, const KeyeQuantSource &to) {
    const Packer packer(w, to);
    return run(w.matrices * packer.layout.pairs, to.threads, [&](int64_t item) {
        packer.unpack(item / packer.layout.pairs, item % packer.layout.pairs);
    });
}

int quant_experts(const KeyeQuant &gate_up, const KeyeQuant &down, const KeyeQuantExperts &call) {
    for (int64_t first = 0; first < call.tokens; first += PART_ROWS) {
        ExpertsCall part(gate_up, down, call, first, std::min(PART_ROWS, call.tokens - first));
        if (part.compute()) return 1;
    }
    return 0;
}

}  // namespace

extern "C" {

int64_t keye_quant_bytes(const KeyeQuant *w) { return Layout(*w).matrix_bytes * w->matrices; }

int keye_quant_pack(const KeyeQuant *w, const KeyeQuantSource *from) {
    return guarded([&] { return quant_pack(*w, *from); });
}

int keye_quant_unpack(const KeyeQuant *w, const KeyeQuantSource *to) {
    return guarded([&] { return quant_unpack(*w, *to); });
}

int keye_quant_matmul(const KeyeQuant *w, const KeyeQuantRows *call) {
    return guarded([&] { return quant_matmul_in_parts(*w, *call); });
}

int keye_quant_experts(const KeyeQuant *gate_up, const KeyeQuant *down, const KeyeQuantExperts *call) {
    return guarded([&] { return quant_experts(*gate_up, *down, *call); });
}
}
