// Entry points of attention in training: cuts queries into blocks, shares them out among threads, and adds up what the
// threads summed.
#include <memory>
#include "threads.h"
#include "train_dense.h"
#include "train_norms.h"
#include "train_sparse.h"

using namespace keye;

namespace {

// Bytes of sums of gradients that may be held beyond those of one thread.
constexpr int64_t SUM_BYTES = 256ll << 20;
// Entries of sets that are worth a thread.
constexpr int64_t THREAD_ENTRIES = 20000;

struct Scratch {
    TrainScratch sparse;
    TrainDenseScratch dense;
};

Scratch &scratch_of_thread() {
    thread_local Scratch scratch;
    return scratch;
}

NormGradientScratch &norm_scratch_of_thread() {
    thread_local NormGradientScratch scratch;
    return scratch;
}

template <class Use> void with_rows(int32_t dtype, Use use) {
#if defined(KEYE_BF16)
    if (dtype == KEYE_BFLOAT16) {
        use(BF16());
        return;
    }
#endif
    (void)dtype;
    use(F32());
}

// What is shared out among threads: blocks of neighbouring queries with sets, or blocks of dense attention.
struct Blocks {
    const KeyeTrain &call;
    const bool is_dense;

    explicit Blocks(const KeyeTrain &c) : call(c), is_dense(!c.sets) {}

    int64_t count() const { return is_dense ? call.block_count : (call.queries + TRAIN_BLOCK - 1) / TRAIN_BLOCK; }

    // Keys that queries of a block look at, summed over queries.
    int64_t entries(int64_t b) const {
        int64_t sum = 0;
        if (is_dense) {
            each_range(b, [&](int64_t queries, int64_t start, int64_t stop) { sum += queries * (stop - start); });
            return sum;
        }
        const TrainBlock block(call, b * TRAIN_BLOCK);
        for (int i = 0; i < block.n; i++) sum += block.sizes[i];
        return sum;
    }

    // Widens first .. last by the rows of keys that a block adds to.
    void widen(int64_t b, int64_t &first, int64_t &last) const {
        auto add = [&](int64_t start, int64_t stop) {
            first = std::min(first, start);
            last = std::max(last, stop);
        };
        if (is_dense) {
            each_range(b, [&](int64_t, int64_t start, int64_t stop) { add(start, stop); });
            return;
        }
        const int64_t stop = std::min(call.queries, (b + 1) * TRAIN_BLOCK);
        for (int64_t i = b * TRAIN_BLOCK; i < stop; i++)
            for (const int32_t *row = call.sets + i * call.width, *end = row + call.width; row < end && *row >= 0; row++)
                add(*row, *row + 1);
    }

    void backward(int64_t b, const KeySums &sums) const {
        with_rows(call.dtype, [&](auto product) {
            using P = decltype(product);
            Scratch &scratch = scratch_of_thread();
            if (is_dense) DenseBlock<P>(call, call.blocks[b], scratch.dense).backward(sums);
            else SparseBlock<P>(call, b * TRAIN_BLOCK, scratch.sparse).backward(sums);
        });
    }

  private:
    // Calls use(queries, start, stop) for the rows of keys of a dense block.
    template <class Use> void each_range(int64_t b, Use use) const {
        const KeyeTrainBlock &block = call.blocks[b];
        int64_t queries = 0;
        for (int64_t p = block.first_piece; p < block.last_piece; p++) {
            const KeyeTrainPiece &piece = call.pieces[p];
            use(piece.count, piece.own_row, piece.own_row + piece.own_before + piece.count);
            queries += piece.count;
        }
        for (int64_t i = block.first_interval; i < block.last_interval; i++)
            use(queries, call.intervals[i].start, call.intervals[i].stop);
    }
};

int count_threads(const KeyeTrain &call, int64_t entries) {
    return (int)std::min<int64_t>(call.threads, 1 + entries / THREAD_ENTRIES);
}

int forward(KeyeTrain &call) {
    const Blocks blocks(call);
    const int64_t count = blocks.count();
    int64_t entries = 0;
    for (int64_t b = 0; b < count; b++) entries += blocks.entries(b);
    const int threads = count_threads(call, entries);
    call.kl = 0;
    if (call.sets) {
        std::vector<double> losses((size_t)count);  // added in the order of blocks on any number of threads
        const int failed = run(count, threads, [&](int64_t b) {
            with_rows(call.dtype, [&](auto product) {
                SparseBlock<decltype(product)> block(call, b * TRAIN_BLOCK, scratch_of_thread().sparse);
                losses[(size_t)b] = block.forward();
            });
        });
        if (failed) return failed;
        for (double loss : losses) call.kl += loss;
    }
    return run(call.block_count, threads, [&](int64_t b) {
        with_rows(call.dtype, [&](auto product) {
            DenseBlock<decltype(product)>(call, call.blocks[b], scratch_of_thread().dense).forward();
        });
    });
}

// A contiguous range of blocks, and the rows of keys that it adds to.
struct Share {
    int64_t first_block, last_block, first_row = INT64_MAX, last_row = 0;
    std::unique_ptr<float, void (*)(void *)> memory{nullptr, std::free};
    KeySums sums{};

    void allocate(const KeyeTrain &call, const Blocks &blocks) {
        for (int64_t b = first_block; b < last_block; b++) blocks.widen(b, first_row, last_row);
        first_row = std::min(first_row, last_row);
        const int64_t rows = last_row - first_row, kv = call.grad_q ? rows * call.groups * call.dim : 0;
        const int64_t indexer = call.grad_indexer_q ? rows * call.indexer_dim : 0;
        memory.reset((float *)std::calloc((size_t)std::max<int64_t>(1, 2 * kv + indexer), sizeof(float)));
        if (!memory) throw std::bad_alloc();
        sums.first = first_row;
        sums.k = memory.get();
        sums.v = sums.k + kv;
        sums.indexer_k = sums.v + kv;
    }
};

// Shares of about equally many entries. A share has sums of its own, so that results do not depend on which thread is
// faster.
std::vector<Share> share_out(const KeyeTrain &call, const Blocks &blocks) {
    std::vector<int64_t> entries((size_t)blocks.count());
    int64_t total = 0;
    for (size_t b = 0; b < entries.size(); b++) total += entries[b] = blocks.entries((int64_t)b);
    const int64_t bytes = call.keys * (2 * (int64_t)call.groups * call.dim + call.indexer_dim) * 4;
    const int64_t most = std::min<int64_t>(count_threads(call, total), 1 + SUM_BYTES / std::max<int64_t>(1, bytes));
    std::vector<Share> shares;
    int64_t seen = 0, first = 0;
    for (size_t b = 0; b < entries.size(); b++) {
        seen += entries[b];
        if (b + 1 < entries.size() && seen * most < total * (int64_t)(shares.size() + 1)) continue;
        shares.push_back({first, (int64_t)b + 1});
        first = (int64_t)b + 1;
    }
    return shares;
}

// Rows of the sums of all shares, added in order, to a gradient.
void reduce(const KeyeTrain &call, const std::vector<Share> &shares, float *KeySums::*part, int64_t width, void *to) {
    std::vector<float> sum((size_t)round_up(width, LANES));
    for (int64_t row = 0; row < call.keys; row++) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (const Share &share : shares)
            if (row >= share.first_row && row < share.last_row) {
                const float *from = share.sums.*part + (row - share.first_row) * width;
                for (int64_t d = 0; d < width; d++) sum[(size_t)d] += from[d];
            }
        store_plain(call.dtype, to, row * width, (int)width, sum.data());
    }
}

int backward(const KeyeTrain &call) {
    const Blocks blocks(call);
    std::vector<Share> shares = share_out(call, blocks);
    const int threads = (int)shares.size();
    const int failed = run(threads, threads, [&](int64_t s) {
        Share &share = shares[(size_t)s];
        share.allocate(call, blocks);
        for (int64_t b = share.first_block; b < share.last_block; b++) blocks.backward(b, share.sums);
    });
    if (failed) return failed;
    if (call.grad_q) {
        reduce(call, shares, &KeySums::k, (int64_t)call.groups * call.dim, call.grad_k);
        reduce(call, shares, &KeySums::v, (int64_t)call.groups * call.dim, call.grad_v);
    }
    if (call.grad_indexer_q) reduce(call, shares, &KeySums::indexer_k, call.indexer_dim, call.grad_indexer_k);
    return 0;
}

}  // namespace

extern "C" {

int keye_train_rows(int dtype) {
#if defined(KEYE_BF16)
    return dtype == KEYE_BFLOAT16 ? KEYE_BFLOAT16 : KEYE_FLOAT32;
#else
    (void)dtype;
    return KEYE_FLOAT32;
#endif
}

int keye_train_forward(KeyeTrain *call) {
    return guarded([&] { return forward(*call); });
}

int keye_swiglu_backward(const KeyeSwigluBackward *call) {
    return guarded([&] { return swiglu_backward(*call); });
}

int keye_norm_backward(const KeyeNormBackward *call) {
    return guarded([&] { return norm_backward(*call, norm_scratch_of_thread); });
}

int keye_train_backward(const KeyeTrain *call) {
    return guarded([&] { return backward(*call); });
}
}
