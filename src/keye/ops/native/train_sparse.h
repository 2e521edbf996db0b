// Attention over sets of keys and the loss of the indexer, forward and backward, for a block of queries.
//
// Nothing is computed that a mask would throw away: each query reads the rows of its own set where they are. The backward
// pass recomputes probabilities from the logarithms of their sums, so that one visit of an entry gives all its gradients.
#pragma once
#include "train_rows.h"

namespace keye {

struct TrainScratch {
    Buffer<uint16_t> operands, upstream;
    Buffer<float> x, y, logits, probs, scores, sums, packed, mean, group;
};

template <class P> class SparseBlock {
  public:
    using Elem = typename P::Elem;

    SparseBlock(const KeyeTrain &call, int64_t begin, TrainScratch &scratch)
        : call_(call), block_(call, begin), scratch_(scratch), ratio_(call.heads / call.groups),
          stride_(round_up(call.width, LANES) + LANES), row_((int64_t)call.groups * call.dim),
          scale_(LOG2_E / std::sqrt((float)call.dim)) {}

    // Writes outputs and logarithms of sums; returns the loss.
    double forward() {
        const int n = block_.n;
        const bool teaches = call_.indexer_q;
        float *mean = scratch_.mean.get(n * stride_);
        std::fill(mean, mean + n * stride_, 0.0f);
        double loss = 0;
        for (int g = 0; g < call_.groups; g++) loss += attend_group(g, teaches ? mean : nullptr);
        if (teaches) loss += cross_entropy(mean);
        return loss;
    }

    void backward(const KeySums &sums) {
        const int n = block_.n;
        float *mean = scratch_.mean.get(n * stride_);
        std::fill(mean, mean + n * stride_, 0.0f);
        for (int g = 0; g < call_.groups; g++) differentiate_group(g, sums, mean);
        if (call_.grad_indexer_q) teach(sums, mean);
    }

  private:
    // Heads head .. head + heads of every query as operands, and as floats where they are asked for.
    void load(const void *from, int all_heads, int head, int heads, int dim, Elem *operands, float *floats) const {
        for (int i = 0; i < block_.n; i++)
            for (int h = 0; h < heads; h++) {
                alignas(64) float x[MAX_DIM];
                const int64_t to = ((int64_t)i * heads + h) * dim;
                load_plain(call_.dtype, from, ((block_.begin + i) * all_heads + head + h) * dim, dim, x);
                to_operand<P>(x, dim, dim, operands + to);
                if (floats) std::copy(x, x + dim, floats + to);
            }
    }

    Elem *operands(Buffer<uint16_t> &buffer, int64_t count) const {
        return (Elem *)buffer.get(count * (int64_t)sizeof(Elem) / 2);
    }

    double attend_group(int g, float *mean) {
        const int n = block_.n, dim = call_.dim;
        const int64_t size = (int64_t)ratio_ * dim, rows = ratio_ * stride_;
        Elem *q = operands(scratch_.operands, n * size);
        float *logits = scratch_.logits.get(n * rows), *sums = scratch_.sums.get(n * size);
        float *packed = scratch_.packed.get((int64_t)ratio_ * VISIT_ROOM), *total = scratch_.y.get(n * ratio_);
        load(call_.q, call_.heads, g * ratio_, ratio_, dim, q, nullptr);
        std::fill(sums, sums + n * size, 0.0f);
        block_.visit(call_, [&](int i, int from, int count, const int32_t *set) {
            const HeadRows<P> keys(call_.k, row_, (int64_t)g * dim, set, count);
            dot_heads<P>(q + i * size, ratio_, dim, keys.rows, 0, count, vset1(scale_), logits + i * rows + from, stride_);
        });
        double loss = 0;
        for (int i = 0; i < n; i++) {
            for (int h = 0; h < ratio_; h++)
                total[i * ratio_ + h] = exponentials(
                    logits + i * rows + h * stride_, block_.sizes[i],
                    call_.lse + (block_.begin + i) * call_.heads + g * ratio_ + h);
            if (mean) loss += average(logits + i * rows, total + i * ratio_, block_.sizes[i], mean + i * stride_);
        }
        block_.visit(call_, [&](int i, int from, int count, const int32_t *set) {
            const HeadRows<P> values(call_.v, row_, (int64_t)g * dim, set, count);
            add_weighted<P>(logits + i * rows + from, stride_, ratio_, values, count, dim, packed, sums + i * size);
        });
        finish_sums<P>(sums, n * size);
        for (int i = 0; i < n; i++)
            for (int h = 0; h < ratio_; h++) {
                float *sum = sums + i * size + (int64_t)h * dim;
                const V share = vset1(block_.sizes[i] ? 1 / total[i * ratio_ + h] : 0);
                for (int d = 0; d < dim; d += LANES) vstore(sum + d, vmul(vload(sum + d), share));
                store_plain(call_.dtype, call_.out, ((block_.begin + i) * call_.heads + g * ratio_ + h) * dim, dim, sum);
            }
        return loss;
    }

    // Logits to base 2 become exponentials above their maximum, zeros behind the last; returns their sum and writes the
    // logarithm of it.
    static float exponentials(float *logits, int count, float *lse) {
        V most = vset1(-INFINITY), total = vzero();
        for (int e = 0; e < count; e += LANES) {
            const V x = vselect(lanes_below(count, e), vload(logits + e), vset1(-INFINITY));
            vstore(logits + e, x);
            most = vmax(x, most);
        }
        const float largest = vlargest(most);
        for (int e = 0; e < count; e += LANES) {
            const V w = vselect(lanes_below(count, e), vexp2(vsub(vload(logits + e), vset1(largest))), vzero());
            total = vadd(total, w);
            vstore(logits + e, w);
        }
        const float sum = vsum(total);
        *lse = count ? largest + std::log2(sum) : INFINITY;
        return sum;
    }

    // Adds the group's mean probabilities to `mean`, which is summed over groups; returns their sum of p log p.
    double average(const float *weights, const float *total, int count, float *mean) {
        float *group = scratch_.group.get(2 * stride_), *logs = group + stride_;
        for (int e = 0; e < count; e += LANES) {
            V p = vzero();
            for (int h = 0; h < ratio_; h++)
                p = vfma(vload(weights + h * stride_ + e), vset1(1 / (total[h] * ratio_)), p);
            vstore(group + e, p);
            vstore(mean + e, vadd(vload(mean + e), p));
        }
        log2_row(group, logs, count);
        double sum = 0;
        for (int e = 0; e < count; e++) sum += (double)(group[e] * logs[e]);
        return sum * LN_2;
    }

    // Products of the indexer's heads with entries of a set, and scores I as logits to base 2: products [heads, VISIT_ROOM].
    void score(const Elem *q, int64_t query, const HeadRows<P> &keys, int count, float *products, float *scores) const {
        const int heads = call_.indexer_heads;
        dot_heads<P>(q, heads, call_.indexer_dim, keys.rows, 0, count, vset1(1), products, VISIT_ROOM);
        const float *gate = call_.gate + query * heads;
        for (int e = 0; e < count; e += LANES) {
            V sum = vzero();
            for (int j = 0; j < heads; j++)
                sum = vfma(vset1(gate[j]), vmax(vload(products + j * VISIT_ROOM + e), vzero()), sum);
            vstore(scores + e, vmul(sum, vset1(LOG2_E)));
        }
    }

    // - sum over groups and entries of p log q, and the logarithm of the sum that q needs.
    double cross_entropy(const float *mean) {
        const int n = block_.n, heads = call_.indexer_heads, dim = call_.indexer_dim;
        Elem *q = operands(scratch_.operands, (int64_t)n * heads * dim);
        float *products = scratch_.x.get((int64_t)heads * VISIT_ROOM), *scores = scratch_.scores.get(n * stride_);
        load(call_.indexer_q, heads, 0, heads, dim, q, nullptr);
        block_.visit(call_, [&](int i, int from, int count, const int32_t *set) {
            const HeadRows<P> keys(call_.indexer_k, dim, 0, set, count);
            alignas(64) float some[VISIT_ROOM];
            score(q + (int64_t)i * heads * dim, block_.begin + i, keys, count, products, some);
            std::copy(some, some + count, scores + i * stride_ + from);
        });
        double loss = 0;
        for (int i = 0; i < n; i++) {
            float *row = scores + i * stride_, *lse = call_.indexer_lse + block_.begin + i;
            const int count = block_.sizes[i];
            double inner = 0, weight = 0;
            for (int e = 0; e < count; e++) {
                inner += (double)mean[i * stride_ + e] * row[e];
                weight += mean[i * stride_ + e];
            }
            exponentials(row, count, lse);
            if (count) loss += (weight * *lse - inner) * LN_2;
        }
        return loss;
    }

    void differentiate_group(int g, const KeySums &sums, float *mean) {
        const int n = block_.n, dim = call_.dim;
        const int64_t size = (int64_t)ratio_ * dim;
        Elem *q = operands(scratch_.operands, n * size), *up = operands(scratch_.upstream, n * size);
        float *q_floats = scratch_.x.get(n * size), *up_floats = scratch_.y.get(n * size);
        float *grad_q = scratch_.sums.get(n * size), *packed = scratch_.packed.get((int64_t)ratio_ * VISIT_ROOM);
        float *logits = scratch_.logits.get((int64_t)ratio_ * VISIT_ROOM);
        float *slopes = scratch_.probs.get((int64_t)ratio_ * VISIT_ROOM);
        float *delta = scratch_.group.get(n * ratio_);
        const bool all = call_.grad_q;
        load(call_.q, call_.heads, g * ratio_, ratio_, dim, q, q_floats);
        if (all) {
            load(call_.grad_out, call_.heads, g * ratio_, ratio_, dim, up, up_floats);
            sum_products(g, up_floats, delta);
        }
        std::fill(grad_q, grad_q + n * size, 0.0f);
        block_.visit(call_, [&](int i, int from, int count, const int32_t *set) {
            const HeadRows<P> keys(call_.k, row_, (int64_t)g * dim, set, count);
            dot_heads<P>(q + i * size, ratio_, dim, keys.rows, 0, count, vset1(scale_), logits, VISIT_ROOM);
            probabilities(g, i, count, logits, mean + i * stride_ + from);
            if (!all) return;
            const HeadRows<P> values(call_.v, row_, (int64_t)g * dim, set, count);
            dot_heads<P>(up + i * size, ratio_, dim, values.rows, 0, count, vset1(1), slopes, VISIT_ROOM);
            const float root = 1 / std::sqrt((float)dim);
            for (int h = 0; h < ratio_; h++)
                for (int e = 0; e < count; e += LANES) {
                    float *slope = slopes + h * VISIT_ROOM + e;
                    const V p = vmul(vload(logits + h * VISIT_ROOM + e), vset1(root));
                    vstore(slope, vmul(p, vsub(vload(slope), vset1(delta[i * ratio_ + h]))));
                }
            add_weighted<P>(slopes, VISIT_ROOM, ratio_, keys, count, dim, packed, grad_q + i * size);
            float *rows[BATCH_KEYS];
            for (int e = 0; e < count; e++) rows[e] = sums.k + (set[e] - sums.first) * row_ + (int64_t)g * dim;
            add_rows(slopes, ratio_, q + i * size, q_floats + i * size, dim, rows, count, packed);
            for (int e = 0; e < count; e++) rows[e] = sums.v + (set[e] - sums.first) * row_ + (int64_t)g * dim;
            add_rows(logits, ratio_, up + i * size, up_floats + i * size, dim, rows, count, packed);
        });
        if (!all) return;
        finish_sums<P>(grad_q, n * size);
        for (int i = 0; i < n; i++)
            store_plain(call_.dtype, call_.grad_q, ((block_.begin + i) * call_.heads + g * ratio_) * dim, (int)size,
                        grad_q + i * size);
    }

    // rows[entry] += sum over heads of weight[h, entry] * x[h], of which there are operands and floats.
    static void add_rows(const float *weights, int heads, const Elem *x, const float *floats, int dim, float *const *rows,
                         int count, float *packed) {
        if (P::PAIR == 2 && heads % 2 == 0) scatter(P(), weights, VISIT_ROOM, heads, x, dim, rows, count, packed);
        else scatter(P(), weights, VISIT_ROOM, heads, floats, dim, rows, count, packed);
    }

    // delta[i, h] = gradient of the output . output.
    void sum_products(int g, const float *up, float *delta) const {
        const int dim = call_.dim;
        for (int i = 0; i < block_.n; i++)
            for (int h = 0; h < ratio_; h++) {
                alignas(64) float out[MAX_DIM];
                load_plain(call_.dtype, call_.out, ((block_.begin + i) * call_.heads + g * ratio_ + h) * dim, dim, out);
                V sum = vzero();
                for (int d = 0; d < dim; d += LANES)
                    sum = vfma(vload(out + d), vload(up + ((int64_t)i * ratio_ + h) * dim + d), sum);
                delta[i * ratio_ + h] = vsum(sum);
            }
    }

    // Logits of entries of query i to probabilities, in place; zeros behind the last. Adds them to `mean`.
    void probabilities(int g, int i, int count, float *logits, float *mean) const {
        for (int h = 0; h < ratio_; h++) {
            const V lse = vset1(call_.lse[(block_.begin + i) * call_.heads + g * ratio_ + h]);
            float *row = logits + h * VISIT_ROOM;
            for (int e = 0; e < count; e += LANES) {
                // Rounding may leave a logit a little above the logarithm of the sum.
                const V x = vmin(vsub(vload(row + e), lse), vzero());
                const V p = vselect(lanes_below(count, e), vexp2(x), vzero());
                vstore(row + e, p);
                vstore(mean + e, vadd(vload(mean + e), p));
            }
        }
    }

    // Gradients of the indexer's queries, keys and gates from `mean`, the probabilities summed over heads.
    void teach(const KeySums &sums, const float *mean) {
        const int n = block_.n, heads = call_.indexer_heads, dim = call_.indexer_dim;
        const int64_t size = (int64_t)heads * dim;
        Elem *q = operands(scratch_.operands, n * size);
        float *floats = scratch_.x.get(n * size), *grad_q = scratch_.sums.get(n * size);
        float *products = scratch_.logits.get((int64_t)heads * VISIT_ROOM);
        float *packed = scratch_.packed.get((int64_t)heads * VISIT_ROOM);
        load(call_.indexer_q, heads, 0, heads, dim, q, floats);
        std::fill(grad_q, grad_q + n * size, 0.0f);
        std::fill_n(call_.grad_gate + block_.begin * heads, (int64_t)n * heads, 0.0f);
        const float weight = (float)call_.kl * (float)call_.groups, share = 1.0f / (float)call_.heads;
        block_.visit(call_, [&](int i, int from, int count, const int32_t *set) {
            const HeadRows<P> keys(call_.indexer_k, dim, 0, set, count);
            alignas(64) float scores[VISIT_ROOM];
            score(q + i * size, block_.begin + i, keys, count, products, scores);
            const V lse = vset1(call_.indexer_lse[block_.begin + i]);
            for (int e = 0; e < count; e += LANES) {
                const V x = vmin(vsub(vload(scores + e), lse), vzero());
                const V teacher = vmul(vload(mean + i * stride_ + from + e), vset1(share));
                const V slope = vmul(vsub(vexp2(x), teacher), vset1(weight));
                vstore(scores + e, vselect(lanes_below(count, e), slope, vzero()));
            }
            for (int j = 0; j < heads; j++) {
                const int64_t at = (block_.begin + i) * heads + j;
                const V gate = vset1(call_.gate[at]);
                float *row = products + j * VISIT_ROOM;
                V sum = vzero();
                for (int e = 0; e < count; e += LANES) {
                    const V x = vload(row + e), slope = vload(scores + e);
                    const uint32_t positive = vgreater(x, vzero());
                    sum = vadd(sum, vselect(positive, vmul(slope, x), vzero()));
                    vstore(row + e, vselect(positive, vmul(slope, gate), vzero()));
                }
                call_.grad_gate[at] += vsum(sum);
            }
            add_weighted<P>(products, VISIT_ROOM, heads, keys, count, dim, packed, grad_q + i * size);
            float *rows[BATCH_KEYS];
            for (int e = 0; e < count; e++) rows[e] = sums.indexer_k + (set[e] - sums.first) * dim;
            add_rows(products, heads, q + i * size, floats + i * size, dim, rows, count, packed);
        });
        finish_sums<P>(grad_q, n * size);
        store_plain(call_.dtype, call_.grad_indexer_q, block_.begin * size, (int)(n * size), grad_q);
    }

    const KeyeTrain &call_;
    const TrainBlock block_;
    TrainScratch &scratch_;
    const int ratio_;
    const int64_t stride_, row_;  // of a query's entries, of a key's numbers
    const float scale_;
};

}  // namespace keye
