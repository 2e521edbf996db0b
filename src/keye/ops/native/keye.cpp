// Entry points: cuts a step into blocks of queries and runs them on a few threads.
#include "dense.h"
#include "encode.h"
#include "gemv.h"
#include "norms.h"
#include "scales.h"
#include "score.h"
#include "threads.h"
#include <numeric>

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
    GemvScratch gemv;
    NormScratch norm;
    Buffer<int32_t> sets;
};

Scratch &scratch_of_thread() {
    thread_local Scratch scratch;
    return scratch;
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

// Causal attention over every key. Few queries read rows where they are; packing tiles for them would not pay.
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
    attend_block<P>(step, stretch, block.begin, block.n, {all, 0, sizes}, 0, stretch.k.heads, nullptr,
                    scratch.attend);
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
        else
            attend_block<P>(step, stretch, block.begin, block.n, sets, 0, stretch.k.heads, stretch.counts,
                            scratch.attend);
    });
}

// The best of keys from .. to for every query of a block, left in the scratch.
void score(const KeyeStep &step, const Block &block, int64_t from, int64_t to, ScoreScratch &scratch) {
    // Keys that are stored in more detail than bfloat16 are not rounded to it.
    const int32_t kind = block.stretch->indexer_k.kind;
    if (kind == KEYE_INT8) {
        score_range<I8>(step, *block.stretch, block.begin, block.n, from, to, scratch);
        return;
    }
    const bool detailed = kind == KEYE_FLOAT32 || kind == KEYE_FLOAT16;
    with_product(detailed ? (int32_t)KEYE_FLOAT32 : step.indexer_dtype, [&](auto product) {
        score_range<decltype(product)>(step, *block.stretch, block.begin, block.n, from, to, scratch);
    });
}

void select(const KeyeStep &step, const Block &block, ScoreScratch &scratch, int32_t *sets, int *sizes) {
    score(step, block, 0, INT64_MAX, scratch);
    for (int i = 0; i < block.n; i++)
        sizes[i] = write_set(scratch.candidates.get(0)[i], step.topk, sets + (int64_t)i * step.topk);
}

// Selection by several threads where there are fewer blocks than threads: each scores a range of keys, and the best of
// the ranges, one behind the other, are reduced to the best of all. Equal scores still go to the earlier position.
int select_in_ranges(const KeyeStep &step, const std::vector<Block> &blocks, int threads, int32_t *sets, int *sizes) {
    const int ranges = (threads + (int)blocks.size() - 1) / (int)blocks.size(), topk = step.topk;
    const int64_t room = (int64_t)ranges * topk + 2 * LANES;  // of one query
    Buffer<float> score_memory;
    Buffer<int32_t> position_memory, key_memory;
    std::vector<int> counts(blocks.size() * ranges * BLOCK);
    const int64_t queries = (int64_t)blocks.size() * BLOCK;
    float *scores = score_memory.get(queries * room);
    int32_t *positions = position_memory.get(queries * room), *keys = key_memory.get(room);
    int failed = run((int64_t)blocks.size() * ranges, threads, [&](int64_t item) {
        const Block &block = blocks[item / ranges];
        const int64_t length = block.stretch->first + block.begin + block.n, range = item % ranges;
        const int64_t share = round_up((length + ranges - 1) / ranges, SCORE_TILE);
        ScoreScratch &scratch = scratch_of_thread().score;
        score(step, block, range * share, (range + 1) * share, scratch);
        for (int i = 0; i < block.n; i++) {
            const Candidates &c = scratch.candidates.get(0)[i];
            const int64_t to = (item / ranges * BLOCK + i) * room + range * topk;
            std::copy(c.scores, c.scores + c.count, scores + to);
            std::copy(c.positions, c.positions + c.count, positions + to);
            counts[item * BLOCK + i] = c.count;
        }
    });
    for (int64_t q = 0; q < queries && !failed; q++) {
        if (q % BLOCK >= blocks[q / BLOCK].n) continue;
        Candidates all;
        all.begin(scores + q * room, positions + q * room, (int)(room - 2 * LANES));
        for (int r = 0; r < ranges; r++) {
            const int count = counts[(q / BLOCK * ranges + r) * BLOCK + q % BLOCK];
            std::copy_n(scores + q * room + (int64_t)r * topk, count, all.scores + all.count);
            std::copy_n(positions + q * room + (int64_t)r * topk, count, all.positions + all.count);
            all.count += count;
        }
        keep_best(all, topk, keys);
        sizes[q] = write_set(all, topk, sets + q * topk);
    }
    return failed;
}

double attend_work(const KeyeStep &step) { return 2.0 * step.heads * step.dim; }
double score_work(const KeyeStep &step) { return (double)step.indexer_heads * step.indexer_dim; }

// A step of fewer blocks than threads, as in decoding: ranges of keys, then groups of heads are shared out.
int sparse_by_few(const KeyeStep &step, const std::vector<Block> &blocks, int threads) {
    Buffer<int32_t> set_memory;
    int32_t *sets = set_memory.get((int64_t)blocks.size() * BLOCK * step.topk);
    std::vector<int> sizes(blocks.size() * BLOCK);
    if (select_in_ranges(step, blocks, threads, sets, sizes.data())) return 1;
    const int64_t groups = blocks[0].stretch->k.heads, parts = std::min<int64_t>(groups, threads);
    return run((int64_t)blocks.size() * parts, threads, [&](int64_t item) {
        const Block &block = blocks[item / parts];
        const int64_t part = item % parts, first = item / parts * BLOCK;
        with_product(step.dtype, [&](auto product) {
            attend_block<decltype(product)>(
                step, *block.stretch, block.begin, block.n, {sets + first * step.topk, step.topk, &sizes[first]},
                (int)(groups * part / parts), (int)(groups * (part + 1) / parts), part ? nullptr : block.stretch->counts,
                scratch_of_thread().attend);
        });
    });
}

int dense_step(const KeyeStep &step, const KeyeStretch *stretches, int64_t count) {
    const std::vector<Block> blocks = cut(stretches, count);
    const int threads = useful_threads(step, blocks, attend_work(step), INT64_MAX);
    return run((int64_t)blocks.size(), threads, [&](int64_t i) {
        Scratch &scratch = scratch_of_thread();
        with_product(step.dtype, [&](auto product) { dense<decltype(product)>(step, blocks[i], scratch); });
    });
}

int sparse_step(const KeyeStep &step, const KeyeStretch *stretches, int64_t count) {
    const std::vector<Block> blocks = cut(stretches, count);
    const int threads = useful_threads(step, blocks, score_work(step), INT64_MAX);
    if (threads >= 2 * (int64_t)blocks.size() && !blocks.empty()) return sparse_by_few(step, blocks, threads);
    return run((int64_t)blocks.size(), threads, [&](int64_t i) {
        Scratch &scratch = scratch_of_thread();
        int32_t *positions = scratch.sets.get((int64_t)BLOCK * step.topk);
        int sizes[BLOCK];
        select(step, blocks[i], scratch.score, positions, sizes);
        attend(step, blocks[i], {positions, step.topk, sizes}, scratch);
    });
}

int select_step(const KeyeStep &step, const KeyeStretch *stretches, int64_t count) {
    const std::vector<Block> blocks = cut(stretches, count);
    const int threads = useful_threads(step, blocks, score_work(step), INT64_MAX);
    return run((int64_t)blocks.size(), threads, [&](int64_t i) {
        int sizes[BLOCK];
        int32_t *sets = blocks[i].stretch->sets + blocks[i].begin * step.topk;
        select(step, blocks[i], scratch_of_thread().score, sets, sizes);
    });
}

int attend_step(const KeyeStep &step, const KeyeStretch *stretches, int64_t count) {
    const std::vector<Block> blocks = cut(stretches, count);
    const int threads = useful_threads(step, blocks, attend_work(step), step.topk);
    return run((int64_t)blocks.size(), threads, [&](int64_t item) {
        const Block &block = blocks[item];
        int sizes[BLOCK];
        const int32_t *sets = block.stretch->sets + block.begin * step.topk;
        for (int i = 0; i < block.n; i++) {
            const int32_t *set = sets + (int64_t)i * step.topk;
            sizes[i] = (int)(std::find_if(set, set + step.topk, [](int32_t p) { return p < 0; }) - set);
        }
        attend(step, block, {sets, step.topk, sizes}, scratch_of_thread());
    });
}

int norm_rows(const KeyeNorm &call) {
    constexpr int64_t SOME = 1 << 15;  // numbers that a thread takes at once
    const int64_t rows = std::max<int64_t>(1, SOME / (call.heads * call.dim)), items = (call.rows + rows - 1) / rows;
    NormScratch &scratch = scratch_of_thread().norm;
    float *weight = scratch.weight.get(call.dim), *bias = nullptr;
    load_plain(call.weight_dtype, call.weight, 0, (int)call.dim, weight);
    if (call.bias) {
        bias = scratch.bias.get(call.dim);
        load_plain(call.weight_dtype, call.bias, 0, (int)call.dim, bias);
    }
    return run(items, items < 16 ? 1 : call.threads, [&](int64_t item) {
        NormRow one(call, scratch_of_thread().norm, weight, bias);
        for (int64_t row = item * rows; row < std::min(call.rows, (item + 1) * rows); row++)
            for (int64_t head = 0; head < call.heads; head++) one.compute(row, head);
    });
}

}  // namespace

extern "C" {

int keye_norm(const KeyeNorm *call) {
    return guarded([&] { return norm_rows(*call); });
}

void keye_encode_rows(const KeyeEncode *call) { encode_rows(*call); }

int keye_linear(const KeyeLinear *call) {
    return guarded([&] { return linear(*call, scratch_of_thread().gemv); });
}

int keye_mix_experts(const KeyeExperts *call) {
    return guarded([&] { return mix_experts(*call, scratch_of_thread().gemv); });
}

const char *keye_variant() { return KEYE_VARIANT; }

void keye_timers(KeyeTimers *timers) {
    timers->score = 1e-9 * (double)phases.score.exchange(0);
    timers->select = 1e-9 * (double)phases.select.exchange(0);
    timers->attend = 1e-9 * (double)phases.attend.exchange(0);
    timers->dense = 1e-9 * (double)phases.dense.exchange(0);
}

int keye_dense(const KeyeStep *step, const KeyeStretch *stretches, int64_t count) {
    return guarded([&] { return dense_step(*step, stretches, count); });
}

int keye_sparse(const KeyeStep *step, const KeyeStretch *stretches, int64_t count) {
    return guarded([&] { return sparse_step(*step, stretches, count); });
}

int keye_select(const KeyeStep *step, const KeyeStretch *stretches, int64_t count) {
    return guarded([&] { return select_step(*step, stretches, count); });
}

int keye_attend(const KeyeStep *step, const KeyeStretch *stretches, int64_t count) {
    return guarded([&] { return attend_step(*step, stretches, count); });
}

void keye_search_scales(const float *x, int64_t count, int32_t n, float low, float high, float *scales, float *minima) {
    search_scales(x, count, n, low, high, scales, minima);
}

void keye_encode(const float *x, int64_t count, int32_t n, float low, float high, const float *scales,
                 const float *minima, uint8_t *codes) {
    encode(x, count, n, low, high, scales, minima, codes);
}
}
