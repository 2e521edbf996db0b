// Entry points: cuts a step into blocks of queries and runs them on a few threads.
#include "dense.h"
#include "score.h"
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

using namespace keye;

namespace {

constexpr int BLOCK = 32;             // queries of a block: what neighbours share against the scratch they need
constexpr int DENSE_QUERIES = 4;      // from here on dense attention packs tiles
constexpr double THREAD_WORK = 4e7;   // multiplications that are worth starting a thread for

struct Block {
    const KeyeStretch *stretch;
    int64_t begin;
    int n;
};

struct Scratch {
    ScoreScratch score;
    AttendScratch attend;
    DenseScratch dense;
    Buffer<int32_t> sets;
};

Scratch &scratch_of_thread() {
    thread_local Scratch scratch;
    return scratch;
}

// Runs `work(block)` for every block on `threads` threads, the caller's among them. Returns 1 when memory ran out.
template <class Work> int run(const std::vector<Block> &blocks, int threads, Work work) {
    std::atomic<size_t> next{0};
    std::atomic<int> failed{0};
    auto loop = [&] {
        try {
            for (size_t i; !failed && (i = next.fetch_add(1)) < blocks.size();) work(blocks[i]);
        } catch (const std::bad_alloc &) {
            failed = 1;
        }
    };
    threads = (int)std::min<size_t>((size_t)std::max(threads, 1), blocks.size());
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads; i++) others.emplace_back(loop);
    } catch (const std::system_error &) {
        // The system has no more threads; those that run do all the work.
    }
    loop();
    for (auto &other : others) other.join();
    return failed;
}

std::vector<Block> cut(const KeyeStretch *stretches, int64_t count) {
    std::vector<Block> blocks;
    for (int64_t s = 0; s < count; s++)
        for (int64_t at = 0; at < stretches[s].stop - stretches[s].start; at += BLOCK)
            blocks.push_back({stretches + s, at, (int)std::min<int64_t>(BLOCK, stretches[s].stop - stretches[s].start - at)});
    return blocks;
}

// Threads worth using when each query multiplies `per_key` numbers for every key it looks at.
int useful_threads(const KeyeStep &step, const std::vector<Block> &blocks, double per_key, int64_t most_keys) {
    double work = 0;
    for (const Block &block : blocks)
        work += per_key * block.n * (double)std::min(most_keys, block.stretch->first + block.begin + block.n);
    return (int)std::min<double>(step.threads, 1 + work / THREAD_WORK);
}

// Calls `use` with the product that computes this dtype.
template <class Use> void with_product(int32_t dtype, Use use) {
#if defined(KEYE_BF16)
    if (dtype == KEYE_BFLOAT16) {
        use(BF16());
        return;
    }
#endif
    (void)dtype;
    use(F32());
}

// Causal attention over every key. Few queries read rows where they lie; packing tiles for them would not pay.
template <class P> void dense(const KeyeStep &step, const Block &block, Scratch &scratch) {
    const KeyeStretch &stretch = *block.stretch;
    const int64_t length = stretch.first + block.begin + block.n;
    if (block.n >= DENSE_QUERIES || stretch.flags & KEYE_FIXED) {
        dense_block<P>(step, stretch, block.begin, block.n, nullptr, scratch.dense);
        return;
    }
    int32_t *all = scratch.sets.get(length);
    std::iota(all, all + length, 0);
    int sizes[BLOCK];
    for (int i = 0; i < block.n; i++) sizes[i] = (int)(length - block.n + i + 1);
    attend_block<P>(step, stretch, block.begin, block.n, {all, 0, sizes}, nullptr, scratch.attend);
}

// Attention over given sets by the kernel that is asked for, or that is faster at this length.
void attend(const KeyeStep &step, const Block &block, const Sets &sets, Scratch &scratch) {
    const KeyeStretch &stretch = *block.stretch;
    const int64_t length = stretch.first + block.begin + block.n;
    bool masked = step.kernel == KEYE_MASKED;
    if (step.kernel == KEYE_AUTO)
        masked = !(stretch.flags & KEYE_FIXED) && block.n >= BLOCK / 2 && length <= step.masked_below;
    with_product(step.dtype, [&](auto product) {
        using P = decltype(product);
        if (masked) dense_block<P>(step, stretch, block.begin, block.n, &sets, scratch.dense);
        else attend_block<P>(step, stretch, block.begin, block.n, sets, stretch.counts, scratch.attend);
    });
}

void select(const KeyeStep &step, const Block &block, Scratch &scratch, int32_t *sets, int *sizes) {
    // Keys that are stored in more detail than bfloat16 are not rounded to it.
    const int32_t kind = block.stretch->index.kind;
    const bool detailed = kind == KEYE_FLOAT32 || kind == KEYE_FLOAT16;
    with_product(detailed ? (int32_t)KEYE_FLOAT32 : step.index_dtype, [&](auto product) {
        using P = decltype(product);
        select_block<P>(step, *block.stretch, block.begin, block.n, scratch.score, sets, sizes);
    });
}

double attend_work(const KeyeStep &step) { return 2.0 * step.heads * step.dim; }
double score_work(const KeyeStep &step) { return (double)step.index_heads * step.index_dim; }

}  // namespace

extern "C" {

const char *keye_variant() { return KEYE_VARIANT; }

void keye_timers(KeyeTimers *timers) {
    timers->score = 1e-9 * (double)phases.score.exchange(0);
    timers->select = 1e-9 * (double)phases.select.exchange(0);
    timers->attend = 1e-9 * (double)phases.attend.exchange(0);
    timers->dense = 1e-9 * (double)phases.dense.exchange(0);
}

int keye_dense(const KeyeStep *step, const KeyeStretch *stretches, int64_t count) {
    const std::vector<Block> blocks = cut(stretches, count);
    const int threads = useful_threads(*step, blocks, attend_work(*step), INT64_MAX);
    return run(blocks, threads, [&](const Block &block) {
        Scratch &scratch = scratch_of_thread();
        with_product(step->dtype, [&](auto product) {
            dense<decltype(product)>(*step, block, scratch);
        });
    });
}

int keye_sparse(const KeyeStep *step, const KeyeStretch *stretches, int64_t count) {
    const std::vector<Block> blocks = cut(stretches, count);
    const int threads = useful_threads(*step, blocks, score_work(*step), INT64_MAX);
    return run(blocks, threads, [&](const Block &block) {
        Scratch &scratch = scratch_of_thread();
        int32_t *positions = scratch.sets.get((int64_t)BLOCK * step->topk);
        int sizes[BLOCK];
        select(*step, block, scratch, positions, sizes);
        attend(*step, block, {positions, step->topk, sizes}, scratch);
    });
}

int keye_select(const KeyeStep *step, const KeyeStretch *stretches, int64_t count) {
    const std::vector<Block> blocks = cut(stretches, count);
    const int threads = useful_threads(*step, blocks, score_work(*step), INT64_MAX);
    return run(blocks, threads, [&](const Block &block) {
        int sizes[BLOCK];
        int32_t *sets = block.stretch->sets + block.begin * step->topk;
        select(*step, block, scratch_of_thread(), sets, sizes);
    });
}

int keye_attend(const KeyeStep *step, const KeyeStretch *stretches, int64_t count) {
    const std::vector<Block> blocks = cut(stretches, count);
    const int threads = useful_threads(*step, blocks, attend_work(*step), step->topk);
    return run(blocks, threads, [&](const Block &block) {
        int sizes[BLOCK];
        const int32_t *sets = block.stretch->sets + block.begin * step->topk;
        for (int i = 0; i < block.n; i++) {
            const int32_t *set = sets + (int64_t)i * step->topk;
            sizes[i] = (int)(std::find_if(set, set + step->topk, [](int32_t p) { return p < 0; }) - set);
        }
        attend(*step, block, {sets, step->topk, sizes}, scratch_of_thread());
    });
}
}
