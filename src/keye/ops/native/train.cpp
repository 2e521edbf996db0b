// Entry points of attention in training: cuts queries into blocks, shares them out among threads, and adds up what the
// threads summed.
#include <memory>
#include "threads.h"
#include "train_sparse.h"

using namespace keye;

namespace {

// Bytes of sums of gradients that may be held beyond those of one thread.
constexpr int64_t SUM_BYTES = 256ll << 20;
// Entries of sets that are worth a thread.
constexpr int64_t THREAD_ENTRIES = 20000;

TrainScratch &scratch_of_thread() {
    thread_local TrainScratch scratch;
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

int64_t count_blocks(const KeyeTrain &call) { return (call.queries + TRAIN_BLOCK - 1) / TRAIN_BLOCK; }

int64_t count_entries(const KeyeTrain &call, int64_t block) {
    int64_t entries = 0;
    const TrainBlock some(call, block * TRAIN_BLOCK);
    for (int i = 0; i < some.n; i++) entries += some.sizes[i];
    return entries;
}

int forward(KeyeTrain &call) {
    const int64_t blocks = count_blocks(call);
    int64_t entries = 0;
    for (int64_t b = 0; b < blocks; b++) entries += count_entries(call, b);
    const int threads = (int)std::min<int64_t>(call.threads, 1 + entries / THREAD_ENTRIES);
    std::vector<double> losses((size_t)blocks);  // added in the order of blocks on any number of threads
    const int failed = run(blocks, threads, [&](int64_t b) {
        with_rows(call.dtype, [&](auto product) {
            losses[(size_t)b] = SparseBlock<decltype(product)>(call, b * TRAIN_BLOCK, scratch_of_thread()).forward();
        });
    });
    call.kl = 0;
    for (double loss : losses) call.kl += loss;
    return failed;
}

// A contiguous range of blocks, and the rows of keys that it adds to.
struct Share {
    int64_t first_block, last_block, first_row = INT64_MAX, last_row = 0;
    std::unique_ptr<float, void (*)(void *)> memory{nullptr, std::free};
    KeySums sums;

    void find_rows(const KeyeTrain &call) {
        const int64_t stop = std::min(call.queries, last_block * TRAIN_BLOCK);
        for (int64_t i = first_block * TRAIN_BLOCK; i < stop; i++)
            for (const int32_t *row = call.sets + i * call.width, *end = row + call.width; row < end && *row >= 0; row++) {
                first_row = std::min<int64_t>(first_row, *row);
                last_row = std::max<int64_t>(last_row, *row + 1);
            }
        first_row = std::min(first_row, last_row);
    }

    void allocate(const KeyeTrain &call) {
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
std::vector<Share> share_out(const KeyeTrain &call) {
    const int64_t blocks = count_blocks(call);
    std::vector<int64_t> entries((size_t)blocks);
    int64_t total = 0;
    for (int64_t b = 0; b < blocks; b++) total += entries[(size_t)b] = count_entries(call, b);
    const int64_t bytes = call.keys * (2 * (int64_t)call.groups * call.dim + call.indexer_dim) * 4;
    const int64_t most = std::min<int64_t>({call.threads, 1 + total / THREAD_ENTRIES, 1 + SUM_BYTES / std::max<int64_t>(1, bytes)});
    std::vector<Share> shares;
    int64_t seen = 0;
    for (int64_t b = 0, first = 0; b < blocks; b++) {
        seen += entries[(size_t)b];
        if (b + 1 < blocks && seen * most < total * (int64_t)(shares.size() + 1)) continue;
        shares.push_back({first, b + 1});
        first = b + 1;
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
    std::vector<Share> shares = share_out(call);
    const int threads = (int)shares.size();
    const int failed = run(threads, threads, [&](int64_t s) {
        Share &share = shares[(size_t)s];
        share.find_rows(call);
        share.allocate(call);
        with_rows(call.dtype, [&](auto product) {
            for (int64_t b = share.first_block; b < share.last_block; b++)
                SparseBlock<decltype(product)>(call, b * TRAIN_BLOCK, scratch_of_thread()).backward(share.sums);
        });
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

int keye_train_backward(const KeyeTrain *call) {
    return guarded([&] { return backward(*call); });
}
}
