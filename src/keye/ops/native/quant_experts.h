// Routed experts in one call: both products, the activation between them, and the sum over a token's experts.
#pragma once
#include "quant_rows.h"

namespace keye {

// silu(gate) * up of 16 numbers.
inline F16 swiglu(F16 gate, F16 up) {
    const F16 one = fset1(1.0f), e = fexp2(fmul(fmagnitude(gate), fset1(-1.44269504f)));
    return fmul(fmul(fdiv(fpick(gate, e, one), fadd(one, e)), gate), up);
}

// Tokens first .. first + tokens of a call.
class ExpertsCall {
  public:
    ExpertsCall(const KeyeQuant &gate_up, const KeyeQuant &down, const KeyeQuantExperts &call, int64_t first, int64_t tokens)
        : gate_up_(gate_up), down_(down), call_(call), up_layout_(gate_up), down_layout_(down), first_(first),
          tokens_(tokens), rows_(tokens * call.top_k), groups_(divide_up(down.inner, GROUP)) {}

    int compute() {
        sort_rows();
        QuantScratch &scratch = quant_scratch();
        const int64_t groups = divide_up(gate_up_.inner, GROUP);
        Group *x = scratch.rows.get(tokens_ * groups);
        const int64_t size = call_.dtype == KEYE_FLOAT32 ? 4 : 2;
        const char *from = (const char *)call_.x + first_ * gate_up_.inner * size;
        if (quantize_rows(call_.dtype, from, tokens_, gate_up_.inner, call_.threads, x)) return 1;
        inner_ = scratch.inner.get(rows_ * groups_);
        places_ = scratch.places.get(2 * rows_);
        for (int64_t r = 0; r < rows_; r++) {
            places_[r] = x + token_of_row_[r] * groups;
            places_[rows_ + r] = inner_ + r * groups_;
        }
        out_ = scratch.sums.get(tokens_ * down_.outputs + PAIR_OUTPUTS);  // the last pair is read whole
        const double read = (double)blocks_.size() * (double)(up_layout_.matrix_bytes + down_layout_.matrix_bytes);
        const int threads = worth_threads(call_.threads, (double)rows_ / (double)blocks_.size(), read);
        if (run((int64_t)blocks_.size() * groups_, threads, [&](int64_t i) { inner(blocks_[i / groups_], i % groups_); }))
            return 1;
        // Each item goes through all experts for its outputs: sums of a token are added in the order of its experts.
        const int64_t parts = threads == 1 ? 1 : std::min<int64_t>(down_layout_.pairs, 2 * threads);
        return run(parts, threads, [&](int64_t part) {
            outer(down_layout_.pairs * part / parts, down_layout_.pairs * (part + 1) / parts);
        });
    }

  private:
    // Orders (token, expert) pairs by expert.
    void sort_rows() {
        QuantScratch &scratch = quant_scratch();
        token_of_row_ = scratch.tokens.get(rows_);
        factor_of_row_ = scratch.factors.get(rows_);
        std::vector<int64_t> sizes(gate_up_.matrices), next(gate_up_.matrices);
        const int64_t *chosen = call_.chosen + first_ * call_.top_k;
        for (int64_t i = 0; i < rows_; i++) sizes[chosen[i]]++;
        for (int64_t e = 1; e < gate_up_.matrices; e++) next[e] = next[e - 1] + sizes[e - 1];
        for (int64_t i = 0; i < rows_; i++) {
            const int64_t row = next[chosen[i]]++;
            token_of_row_[row] = i / call_.top_k;
            factor_of_row_[row] = call_.weights[first_ * call_.top_k + i];
        }
        blocks_ = cut_rows(sizes.data(), gate_up_.matrices);
    }

    // One group of 64 inner numbers of some rows of an expert: gate, up, activation, rounding.
    void inner(const RowBlock &block, int64_t group) {
        float *both = quant_scratch().some.get((int64_t)block.count * 2 * GROUP);
        const int64_t half = up_layout_.pairs / 2, pairs = std::min<int64_t>(2, half - 2 * group);
        for (int64_t p = 0; p < 2 * pairs; p++) {
            const int64_t pair = p % pairs + 2 * group + (p < pairs ? 0 : half);
            float *to = both + (p < pairs ? 0 : GROUP) + p % pairs * PAIR_OUTPUTS;
            product_pair(up_layout_, up_layout_.pair(gate_up_, block.matrix, pair), places_ + block.begin, block.count,
                         [&](int64_t first, int count, const float *sums) {
                for (int r = 0; r < count; r++)
                    std::memcpy(to + (first + r) * 2 * GROUP, sums + r * PAIR_OUTPUTS, PAIR_OUTPUTS * sizeof(float));
            });
        }
        alignas(64) float activated[GROUP] = {};
        for (int r = 0; r < block.count; r++, both += 2 * GROUP) {
            for (int i = 0; i < pairs * PAIR_OUTPUTS; i += 16)
                fstore(activated + i, swiglu(fload(both + i), fload(both + GROUP + i)));
            quantize_group(activated, inner_[(block.begin + r) * groups_ + group]);
        }
    }

    // Outputs of pairs begin .. end of all tokens.
    void outer(int64_t begin, int64_t end) {
        const int64_t width = down_.outputs, first = begin * PAIR_OUTPUTS, last = std::min(width, end * PAIR_OUTPUTS);
        for (int64_t t = 0; t < tokens_; t++) std::fill(out_ + t * width + first, out_ + t * width + last, 0.0f);
        for (const RowBlock &block : blocks_)
            for (int64_t pair = begin; pair < end; pair++) {
                const int outputs = (int)std::min<int64_t>(PAIR_OUTPUTS, width - pair * PAIR_OUTPUTS);
                product_pair(down_layout_, down_layout_.pair(down_, block.matrix, pair), places_ + rows_ + block.begin,
                             block.count, [&](int64_t at, int count, const float *sums) {
                    for (int r = 0; r < count; r++, sums += PAIR_OUTPUTS) {
                        const int64_t row = block.begin + at + r;
                        const float factor = factor_of_row_[row];
                        float *to = out_ + token_of_row_[row] * width + pair * PAIR_OUTPUTS;
                        for (int o = 0; o < outputs; o++) to[o] += factor * sums[o];
                    }
                });
            }
        for (int64_t t = 0; t < tokens_; t++)
            for (int64_t at = first; at < last; at += PAIR_OUTPUTS)
                store_outputs(call_.dtype, call_.out, (first_ + t) * width + at,
                              (int)std::min<int64_t>(PAIR_OUTPUTS, width - at), out_ + t * width + at);
    }

    const KeyeQuant &gate_up_, &down_;
    const KeyeQuantExperts &call_;
    const Layout up_layout_, down_layout_;
    const int64_t first_, tokens_, rows_, groups_;
    std::vector<RowBlock> blocks_;
    int64_t *token_of_row_ = nullptr;
    float *factor_of_row_ = nullptr, *out_ = nullptr;
    Group *inner_ = nullptr;
    const Group **places_ = nullptr;
};

}  // namespace keye
