// Dense attention of a block of queries in training, forward and backward, by tiles of keys at fixed positions: the
// forward pass has the arithmetic of dense.h, so that outputs are those of inference to the last bit.
//
// Tiles of what all pieces of a block see are packed once for all of them; each piece then takes the tiles that its own
// keys are in.
#pragma once
#include "dense.h"
#include "train_rows.h"

namespace keye {

struct TrainDenseScratch {
    DenseScratch tile;
    Buffer<uint16_t> q, up;
    Buffer<float> part, out, most, total, logits, slopes, q_values, up_values, turned, value_panels, key_values;
    Buffer<uint32_t> masks;
    Buffer<int32_t> shared;
    Buffer<int> cursor;
};

template <class P> class DenseBlock {
  public:
    using Elem = typename P::Elem;
    static constexpr int PANELS = DENSE_TILE / LANES;

    DenseBlock(const KeyeTrain &call, const KeyeTrainBlock &block, TrainDenseScratch &scratch)
        : call_(call), block_(block), scratch_(scratch), ratio_(call.heads / call.groups),
          row_((int64_t)call.groups * call.dim) {
        for (int64_t p = block.first_piece; p < block.last_piece; p++) n_ += (int)call.pieces[p].count;
        rows_ = (int)round_up(n_ * ratio_, std::max(16, DENSE_ROWS));
        for (int64_t i = block.first_interval; i < block.last_interval; i++)
            before_ += call.intervals[i].stop - call.intervals[i].start;
        int32_t *shared = scratch.shared.get(before_ + 1);
        for (int64_t i = block.first_interval; i < block.last_interval; i++)
            for (int64_t row = call.intervals[i].start; row < call.intervals[i].stop; row++) *shared++ = (int32_t)row;
        masks_ = scratch.masks.get((int64_t)(n_ + 1) * PANELS);
        std::fill(masks_ + (int64_t)n_ * PANELS, masks_ + (int64_t)(n_ + 1) * PANELS, 0);  // of rows that pad
    }

    // Outputs, and logarithms of sums unless sets are masks.
    void forward() {
#if defined(KEYE_AMX)
        tile_begin();
#endif
        const int dim = call_.dim;
        Elem *q = operands(scratch_.q);
        float *out = scratch_.out.get((int64_t)rows_ * dim), *most = scratch_.most.get(rows_);
        float *total = scratch_.total.get(rows_);
        const V scale = vset1(LOG2_E / std::sqrt((float)dim));
        for (int g = 0; g < call_.groups; g++) {
            load(call_.q, g, q);
            std::fill(out, out + (int64_t)rows_ * dim, 0.0f);
            std::fill(most, most + rows_, -INFINITY);
            std::fill(total, total + rows_, 0.0f);
            tiles([&](int from, int to, const int32_t *keys) {
                pack_panels<P>(dim, [&](int i, int) { return operand(call_.k, g, keys[i]); },
                               scratch_.tile.keys.get((int64_t)DENSE_TILE * dim / P::PAIR));
                pack_values<P>(dim, DENSE_TILE, [&](int i, int) { return operand(call_.v, g, keys[i]); },
                               scratch_.tile.values.get((int64_t)DENSE_TILE * dim / P::PAIR));
                for (int r = from / DENSE_ROWS * DENSE_ROWS; r < to; r += DENSE_ROWS) {
                    const uint32_t *of_row[DENSE_ROWS];
                    if (masks_of(r, DENSE_ROWS, from, to, of_row))
                        dense_rows<P>(q + (int64_t)r * dim, dim, scratch_.tile, scale, of_row, most + r, total + r,
                                      out + (int64_t)r * dim);
                }
            });
            finish_sums<P>(out, (int64_t)rows_ * dim);
            each_row([&](int r, int64_t at) {
                float *sum = out + (int64_t)r * dim;
                const V share = vset1(total[r] > 0 ? 1 / total[r] : 0);
                for (int d = 0; d < dim; d += LANES) vstore(sum + d, vmul(vload(sum + d), share));
                store_plain(call_.dtype, call_.out, (at + g * ratio_) * dim, dim, sum);
                if (!call_.sets) call_.lse[at + g * ratio_] = total[r] > 0 ? most[r] + std::log2(total[r]) : INFINITY;
            });
        }
    }

    void backward(const KeySums &sums) {
        const int dim = call_.dim;
        Elem *q = operands(scratch_.q), *up = operands(scratch_.up);
        float *delta = scratch_.total.get(rows_), *lse = scratch_.most.get(rows_);
        float *grad_q = scratch_.out.get((int64_t)rows_ * dim);
        float *q_values = scratch_.q_values.get((int64_t)DENSE_TILE * dim / P::PAIR);
        float *up_values = scratch_.up_values.get((int64_t)DENSE_TILE * dim / P::PAIR);
        for (int g = 0; g < call_.groups; g++) {
            load(call_.q, g, q);
            load(call_.grad_out, g, up);
            pack_values<P>(dim, rows_, [&](int r, int) { return q + (int64_t)r * dim; }, q_values);
            pack_values<P>(dim, rows_, [&](int r, int) { return up + (int64_t)r * dim; }, up_values);
            std::fill(delta, delta + rows_, 0.0f);
            std::fill(lse, lse + rows_, 0.0f);
            each_row([&](int r, int64_t at) {
                alignas(64) float x[MAX_DIM], y[MAX_DIM];
                load_plain(call_.dtype, call_.out, (at + g * ratio_) * dim, dim, x);
                load_plain(call_.dtype, call_.grad_out, (at + g * ratio_) * dim, dim, y);
                V sum = vzero();
                for (int d = 0; d < dim; d += LANES) sum = vfma(vload(x + d), vload(y + d), sum);
                delta[r] = vsum(sum);
                lse[r] = call_.lse[at + g * ratio_];
            });
            std::fill(grad_q, grad_q + (int64_t)rows_ * dim, 0.0f);
            tiles([&](int from, int to, const int32_t *keys) {
                differentiate_tile(g, from / 16 * 16, (int)round_up(to, 16), from, to, keys, {q, up, delta, lse}, grad_q,
                                   sums);
            });
            finish_sums<P>(grad_q, (int64_t)rows_ * dim);
            each_row([&](int r, int64_t at) {
                store_plain(call_.dtype, call_.grad_q, (at + g * ratio_) * dim, dim, grad_q + (int64_t)r * dim);
            });
        }
    }

  private:
    struct RowsOfGroup {
        const Elem *q, *up;
        const float *delta, *lse;
    };

    Elem *operands(Buffer<uint16_t> &buffer) const {
        return (Elem *)buffer.get((int64_t)rows_ * call_.dim * (int64_t)sizeof(Elem) / 2);
    }

    const Elem *operand(const void *rows, int g, int32_t row) const {
        alignas(64) static const Elem zeros[MAX_DIM] = {};
        return row < 0 ? zeros : (const Elem *)rows + row * row_ + (int64_t)g * call_.dim;
    }

    // Calls use(row of the block, first head of the query in tensors of all heads) for every row of a group.
    template <class Use> void each_row(Use use) const {
        int r = 0;
        for (int64_t p = block_.first_piece; p < block_.last_piece; p++)
            for (int64_t i = 0; i < call_.pieces[p].count; i++)
                for (int h = 0; h < ratio_; h++) use(r++, (call_.pieces[p].query + i) * call_.heads + h);
    }

    void load(const void *from, int g, Elem *to) const {
        std::fill(to, to + (int64_t)rows_ * call_.dim, (Elem)0);
        each_row([&](int r, int64_t at) {
            alignas(64) float x[MAX_DIM];
            load_plain(call_.dtype, from, (at + g * ratio_) * call_.dim, call_.dim, x);
            to_operand<P>(x, call_.dim, call_.dim, to + (int64_t)r * call_.dim);
        });
    }

    // Calls use(first row, one past the last row, keys) for every tile of keys, -1 behind the last, and the rows of the
    // block that see some of them; masks are set for these.
    template <class Use> void tiles(Use use) {
        const int64_t full = block_.last_piece - block_.first_piece > 1 ? before_ / DENSE_TILE * DENSE_TILE : 0;
        int *cursor = scratch_.cursor.get(n_);
        std::fill(cursor, cursor + n_, 0);
        int32_t keys[DENSE_TILE];
        const int32_t *shared = scratch_.shared.get(0);
        for (int64_t tile = 0; tile < full; tile += DENSE_TILE) {
            std::copy(shared + tile, shared + tile + DENSE_TILE, keys);
            int i = 0;
            for (int64_t p = block_.first_piece; p < block_.last_piece; p++)
                for (int64_t k = 0; k < call_.pieces[p].count; k++, i++)
                    mask(i, call_.pieces[p].query + k, DENSE_TILE, keys, cursor);
            use(0, n_ * ratio_, keys);
        }
        int first = 0;
        for (int64_t p = block_.first_piece; p < block_.last_piece; p++) {
            const KeyeTrainPiece &piece = call_.pieces[p];
            const int64_t sees = before_ + piece.own_before, length = sees + piece.count;
            for (int64_t tile = full; tile < length; tile += DENSE_TILE) {
                for (int64_t k = 0; k < DENSE_TILE; k++) {
                    const int64_t at = tile + k;
                    keys[k] = at >= length ? -1 : at < before_ ? shared[at] : (int32_t)(piece.own_row + at - before_);
                }
                for (int i = 0; i < piece.count; i++)
                    mask(first + i, piece.query + i, sees + i + 1 - tile, keys, cursor);
                use(first * ratio_, (first + (int)piece.count) * ratio_, keys);
            }
            first += (int)piece.count;
        }
    }

    // The first `visible` keys of a tile, or those of them in the query's set.
    void mask(int i, int64_t query, int64_t visible, const int32_t *keys, int *cursor) {
        uint32_t *to = masks_ + (int64_t)i * PANELS;
        for (int p = 0; p < PANELS; p++) to[p] = lanes_below((int)std::clamp<int64_t>(visible, 0, DENSE_TILE), p * LANES);
        if (!call_.sets) return;
        const int32_t *set = call_.sets + query * call_.width;
        uint32_t chosen[PANELS] = {};
        for (int k = 0; k < DENSE_TILE && cursor[i] < call_.width && set[cursor[i]] >= 0; k++)
            if (keys[k] == set[cursor[i]]) {
                chosen[k / LANES] |= 1u << (k % LANES);
                cursor[i]++;
            }
        std::copy(chosen, chosen + PANELS, to);
    }

    // Masks of rows r .. r + count, empty for those outside from .. to; whether any key is seen.
    bool masks_of(int r, int count, int from, int to, const uint32_t **of_row) const {
        uint32_t any = 0;
        for (int k = 0; k < count; k++) {
            const bool inside = r + k >= from && r + k < to;
            of_row[k] = masks_ + (int64_t)(inside ? (r + k) / ratio_ : n_) * PANELS;
            for (int p = 0; p < PANELS; p++) any |= of_row[k][p];
        }
        return any;
    }

    // Adds what a tile gives to the gradients of its keys and of rows first .. last (multiples of 16), of which from .. to
    // see it.
    void differentiate_tile(int g, int first, int last, int from, int to, const int32_t *keys, const RowsOfGroup &rows,
                            float *grad_q, const KeySums &sums) {
        const int dim = call_.dim, units = dim / P::PAIR;
        float *key_panels = scratch_.tile.keys.get((int64_t)DENSE_TILE * units);
        float *value_panels = scratch_.value_panels.get((int64_t)DENSE_TILE * units);
        float *key_values = scratch_.key_values.get((int64_t)DENSE_TILE * units);
        float *probs = scratch_.logits.get((int64_t)rows_ * DENSE_TILE);
        float *slopes = scratch_.slopes.get((int64_t)rows_ * DENSE_TILE);
        pack_panels<P>(dim, [&](int i, int) { return operand(call_.k, g, keys[i]); }, key_panels);
        pack_panels<P>(dim, [&](int i, int) { return operand(call_.v, g, keys[i]); }, value_panels);
        pack_values<P>(dim, DENSE_TILE, [&](int i, int) { return operand(call_.k, g, keys[i]); }, key_values);
        const V scale = vset1(LOG2_E / std::sqrt((float)dim)), root = vset1(1 / std::sqrt((float)dim));
        for (int r = first; r < last; r += SCORE_HEADS) {
            const uint32_t *of_row[SCORE_HEADS];
            const bool any = masks_of(r, SCORE_HEADS, from, to, of_row);
            for (int at = 0; any && at < DENSE_TILE; at += LANES * SCORE_PANELS) {
                dense_logits<P, SCORE_HEADS>((const float *)(rows.q + (int64_t)r * dim), units,
                                             key_panels + (int64_t)at * units, scale, probs + r * DENSE_TILE + at);
                dense_logits<P, SCORE_HEADS>((const float *)(rows.up + (int64_t)r * dim), units,
                                             value_panels + (int64_t)at * units, vset1(1), slopes + r * DENSE_TILE + at);
            }
            for (int k = 0; k < SCORE_HEADS; k++) {
                const V lse = vset1(rows.lse[r + k]), delta = vset1(rows.delta[r + k]);
                for (int p = 0; p < PANELS; p++) {
                    float *prob = probs + (r + k) * DENSE_TILE + p * LANES;
                    float *slope = slopes + (r + k) * DENSE_TILE + p * LANES;
                    const V x = vexp2(vmin(vsub(vload(prob), lse), vzero()));
                    const V y = vmul(vmul(x, root), vsub(vload(slope), delta));
                    vstore(prob, vselect(of_row[k][p], x, vzero()));
                    vstore(slope, vselect(of_row[k][p], y, vzero()));
                }
            }
        }
        add_to_keys(g, first, last, keys, slopes, scratch_.q_values.get(0), sums.k, sums.first);
        add_to_keys(g, first, last, keys, probs, scratch_.up_values.get(0), sums.v, sums.first);
        for (int r = first; r < last; r++)
            for (int p = 0; p < PANELS; p++)  // never ahead of what is read
                P::store((Elem *)(slopes + r * DENSE_TILE) + p * LANES, vload(slopes + r * DENSE_TILE + p * LANES));
        for (int r = first; r < last; r += VALUE_HEADS)
            dense_values<P, VALUE_HEADS>(slopes + r * DENSE_TILE, key_values, DENSE_TILE / P::PAIR, dim,
                                         grad_q + (int64_t)r * dim);
    }

    // sums[key] += sum over rows of weights[row, key] * values[row].
    void add_to_keys(int g, int first, int last, const int32_t *keys, const float *weights, const float *values,
                     float *sums, int64_t first_key) {
        const int dim = call_.dim;
        float *turned = scratch_.turned.get((int64_t)DENSE_TILE * DENSE_TILE);
        float *part = scratch_.part.get((int64_t)VALUE_HEADS * dim);
        for (int at = 0; at < DENSE_TILE; at += LANES)
            for (int r = first; r < last; r += LANES) {
                V square[LANES];
                for (int i = 0; i < LANES; i++) square[i] = vload(weights + (r + i) * DENSE_TILE + at);
                vtranspose(square);
                for (int i = 0; i < LANES; i++) P::store((Elem *)(turned + (at + i) * DENSE_TILE) + r, square[i]);
            }
        for (int k = 0; k < DENSE_TILE && keys[k] >= 0; k += VALUE_HEADS) {
            std::fill(part, part + VALUE_HEADS * dim, 0.0f);
            dense_values<P, VALUE_HEADS>(turned + k * DENSE_TILE + first / P::PAIR, values + first / P::PAIR * 2 * LANES,
                                         (last - first) / P::PAIR, dim, part);
            finish_sums<P>(part, (int64_t)VALUE_HEADS * dim);
            for (int i = 0; i < VALUE_HEADS && keys[k + i] >= 0; i++) {
                float *to = sums + (keys[k + i] - first_key) * row_ + (int64_t)g * dim;
                for (int d = 0; d < dim; d += LANES) vstore(to + d, vadd(vload(to + d), vload(part + i * dim + d)));
            }
        }
    }

    const KeyeTrain &call_;
    const KeyeTrainBlock &block_;
    TrainDenseScratch &scratch_;
    const int ratio_;
    const int64_t row_;
    int n_ = 0, rows_ = 0;
    int64_t before_ = 0;
    uint32_t *masks_;
};

}  // namespace keye
