// Attention of queries over their selected keys: each query reads its own rows and nothing is computed that a mask
// would throw away.
//
// Three passes for each group of heads: logits, softmax over the whole set, weighted values. The passes over rows walk
// the union of the block's sets in tiles, all queries in each tile, since neighbours select similar keys. Tiles and neighbours change only the order in which queries are visited, never the
// arithmetic of one query, so results do not depend on them.
#pragma once
#include <sys/mman.h>
#include <algorithm>
#include "attend_tiles.h"
#include "memory.h"
#include "rows.h"
#include "timers.h"

namespace keye {

constexpr int TILE_ROWS = 512;      // rows of a union that are brought together at a time: they fit the second cache
constexpr int AHEAD = 32;           // rows by which one is asked for before it is used
constexpr int ALONE_KEYS = 128;     // rows of all groups that a query alone takes at once where they are,
constexpr int DECODED_KEYS = 16;    // and where they are decoded first
constexpr int ALONE_AHEAD = 64;     // rows by which it asks for one
constexpr int BATCH_KEYS = 128;     // rows that a kernel is handed at once: a multiple of LANES
constexpr int PAD_TO = 32;          // operands have a multiple of this many dimensions
constexpr float LOG2_E = 1.4426950408889634f;

struct Sets {
    const int32_t *positions;  // [n, stride], ascending
    int64_t stride;
    const int *sizes;          // [n]
};

struct AttendScratch {
    Buffer<uint16_t> queries;
    Buffer<float> logits, out, totals, panels, staging;
    Buffer<uint16_t> gathered, carry;
    Buffer<uint64_t> bits;
    Buffer<int32_t> rank, slots, all;
    Buffer<int> cursor;
};

// Logits of HEADS heads against `count` rows: out[h * stride + i] = scale * q[h] . rows[i], the numbers of a row being
// `skip` behind its pointer. `rows` has valid pointers up to a multiple of LANES, and as many entries of `out` are
// written.
template <class P, int HEADS>
inline void dot_rows(const typename P::Elem *q, int dim, const typename P::Elem *const *rows, int64_t skip, int count,
                     V scale, float *out, int64_t stride) {
    constexpr int KEYS = LANES / HEADS, STEP = LANES * P::PAIR;
    for (int i = 0; i < count; i += KEYS) {
        V sum[LANES];
        for (int a = 0; a < LANES; a++) sum[a] = vzero();
        for (int d = 0; d < dim; d += STEP) {
            V x[HEADS];
            for (int h = 0; h < HEADS; h++) x[h] = vload((const float *)(q + h * dim + d));
            for (int k = 0; k < KEYS; k++) {
                V y = vload((const float *)(rows[i + k] + skip + d));
                for (int h = 0; h < HEADS; h++) sum[h * KEYS + k] = P::madd(sum[h * KEYS + k], x[h], y);
            }
        }
        vscatter<HEADS>(vmul(vsum_each(sum), scale), out + i, stride);
    }
}

template <class P>
inline void dot_heads(const typename P::Elem *q, int heads, int dim, const typename P::Elem *const *rows, int64_t skip,
                      int count, V scale, float *out, int64_t stride) {
    int h = 0;
    for (; h + 4 <= heads; h += 4) dot_rows<P, 4>(q + h * dim, dim, rows, skip, count, scale, out + h * stride, stride);
    for (; h + 2 <= heads; h += 2) dot_rows<P, 2>(q + h * dim, dim, rows, skip, count, scale, out + h * stride, stride);
    for (; h < heads; h++) dot_rows<P, 1>(q + h * dim, dim, rows, skip, count, scale, out + h * stride, stride);
}

// out[h] += sum over steps of weight[h, step] * values[step]; a step is P::PAIR rows and one unit of weights.
template <class P, int HEADS>
inline void add_values(const float *weights, int64_t stride, const typename P::Elem *const *rows, int64_t skip, int steps,
                       int dim, float *out) {
    for (int d = 0; d < dim; d += 2 * LANES) {
        V sum[HEADS][2];
        for (int h = 0; h < HEADS; h++)
            for (int c = 0; c < 2; c++) sum[h][c] = vload(out + h * dim + d + c * LANES);
        for (int s = 0; s < steps; s++) {
            V x, y;
            P::expand(rows + s * P::PAIR, skip + d, &x, &y);
            for (int h = 0; h < HEADS; h++) {
                V w = vset1(weights[h * stride + s]);
                sum[h][0] = P::madd(sum[h][0], w, x);
                sum[h][1] = P::madd(sum[h][1], w, y);
            }
        }
        for (int h = 0; h < HEADS; h++)
            for (int c = 0; c < 2; c++) vstore(out + h * dim + d + c * LANES, sum[h][c]);
    }
}

template <class P>
inline void add_values_heads(const float *weights, int64_t stride, int heads, const typename P::Elem *const *rows,
                             int64_t skip, int steps, int dim, float *out) {
    int h = 0;
    for (; h + VALUE_HEADS <= heads; h += VALUE_HEADS)
        add_values<P, VALUE_HEADS>(weights + h * stride, stride, rows, skip, steps, dim, out + h * dim);
    if constexpr (VALUE_HEADS > 4)
        for (; h + 4 <= heads; h += 4)
            add_values<P, 4>(weights + h * stride, stride, rows, skip, steps, dim, out + h * dim);
    for (; h + 2 <= heads; h += 2) add_values<P, 2>(weights + h * stride, stride, rows, skip, steps, dim, out + h * dim);
    for (; h < heads; h++) add_values<P, 1>(weights + h * stride, stride, rows, skip, steps, dim, out + h * dim);
}

// Turns logits (base 2) into weights of the product's type in place, followed by zeros where a tile of 32 keys may still
// read; returns their sum.
template <class P> inline float softmax_row(float *logits, int count) {
    const int padded = (int)round_up(count, LANES);
    for (int i = count; i < padded; i++) logits[i] = -INFINITY;
    V most = vload(logits);
    for (int i = LANES; i < padded; i += LANES) most = vmax(most, vload(logits + i));
    V largest = vset1(vlargest(most)), total = vzero();
    typename P::Elem *weights = (typename P::Elem *)logits;  // never ahead of what is read
    for (int i = 0; i < padded; i += LANES) {
        uint32_t valid = count - i >= LANES ? (1u << LANES) - 1 : (1u << (count - i)) - 1;
        V w = vselect(valid, vexp2(vsub(vload(logits + i), largest)), vzero());
        total = vadd(total, w);
        P::store(weights + i, w);
    }
    if constexpr (P::PAIR == 2)
        for (int i = padded; i < padded + 32; i += LANES) P::store(weights + i, vzero());
    return vsum(total);
}

// Queries of one group of heads as operands, Hadamard transformed where the stored keys are.
template <class P>
inline void load_queries(const KeyeStep &step, int64_t token, int head, int heads, bool rotated, int padded,
                         typename P::Elem *out) {
    for (int h = 0; h < heads; h++) {
        alignas(64) float x[MAX_DIM];
        load_plain(step.dtype, step.q, (token * step.heads + head + h) * step.dim, step.dim, x);
        if (rotated) hadamard(x, step.dim);
        to_operand<P>(x, step.dim, padded, out + (int64_t)h * padded);
    }
}

// Writes sums / total of each head, brought back to the order of dimensions and out of the Hadamard transform.
template <class P>
inline void write_outputs(const KeyeStep &step, int64_t token, int head, int heads, bool rotated, int padded,
                          float *sums, const float *totals) {
    for (int h = 0; h < heads; h++) {
        float *x = sums + (int64_t)h * padded;
        V scale = vset1(totals[h] > 0 ? 1.0f / totals[h] : 0.0f);
        for (int d = 0; d < padded; d += 2 * LANES) {
            V a = vmul(vload(x + d), scale), b = vmul(vload(x + d + LANES), scale);
            P::finish(&a, &b);
            vstore(x + d, a);
            vstore(x + d + LANES, b);
        }
        if (rotated) hadamard(x, step.dim);
        store_plain(step.dtype, step.out, (token * step.heads + head + h) * step.dim, step.dim, x);
    }
}

// Hands rows to `use(query, from, to, rows)`: entries from .. to of the query's set and pointers to their rows (followed
// by LANES more that may be read). `from` is a multiple of P::PAIR; each entry is handed over once, in order.
template <class P> class RowWalk {
  public:
    using Elem = typename P::Elem;

    RowWalk(const Source<P> &source, const Sets &sets, int n, AttendScratch &scratch)
        : source_(source), sets_(sets), n_(n), scratch_(scratch) {}

    // Numbers the rows of the union in order of position: slots[i, k] of entry k of query i. Returns how many there are.
    int number_union(int64_t length) const {
        const int64_t words = length / 64 + 1;
        uint64_t *bits = scratch_.bits.get(words);
        int32_t *rank = scratch_.rank.get(words);
        int64_t most = 0;
        std::fill(bits, bits + words, 0);
        for (int i = 0; i < n_; i++) {
            most += sets_.sizes[i];
            for (int k = 0; k < sets_.sizes[i]; k++) {
                int32_t p = sets_.positions[i * sets_.stride + k];
                bits[p >> 6] |= 1ull << (p & 63);
            }
        }
        int32_t *all = scratch_.all.get(std::min(most, length) + 1), total = 0;
        for (int64_t w = 0; w < words; w++) {
            rank[w] = total;
            for (uint64_t left = bits[w]; left; left &= left - 1)
                all[total++] = (int32_t)(w * 64 + __builtin_ctzll(left));
        }
        const int longest = *std::max_element(sets_.sizes, sets_.sizes + n_);
        int32_t *slots = scratch_.slots.get((int64_t)n_ * sets_.stride + longest);
        for (int i = 0; i < n_; i++)
            for (int k = 0; k < sets_.sizes[i]; k++) {
                int32_t p = sets_.positions[i * sets_.stride + k];
                uint64_t below = bits[p >> 6] & ((1ull << (p & 63)) - 1);
                slots[i * sets_.stride + k] = rank[p >> 6] + __builtin_popcountll(below);
            }
        return total;
    }

    // Rows of the union are brought together tile by tile, decoded where they must be, and every query takes its own
    // from there: from main memory each comes once for all queries, and it is dense in the second cache.
    template <class Use> void gathered(int head, int total, Use use) const {
        const int dim = source_.padded;
        Elem *rows = (Elem *)scratch_.gathered.get((int64_t)TILE_ROWS * dim * (int64_t)sizeof(Elem) / 2);
        Elem *carry = (Elem *)scratch_.carry.get((int64_t)n_ * dim * (int64_t)sizeof(Elem) / 2);
        const int32_t *slots = scratch_.slots.get(0), *all = scratch_.all.get(0);
        int *cursor = scratch_.cursor.get(n_);
        std::fill(cursor, cursor + n_, 0);
        for (int start = 0; start < total; start += TILE_ROWS) {
            const int stop = std::min(total, start + TILE_ROWS);
            for (int slot = start; slot < stop; slot++) {
                ask_for(all[std::min(slot + AHEAD, total - 1)], head);
                source_.decode(all[slot], head, rows + (int64_t)(slot - start) * dim);
            }
            for (int i = 0; i < n_; i++) {
                const int32_t *own = slots + i * sets_.stride;
                int from = cursor[i], size = sets_.sizes[i];
                int seen = (int)(std::lower_bound(own + from, own + size, stop) - own);
                int to = seen < size ? seen / P::PAIR * P::PAIR : seen;
                auto row = [&](int k) {  // an entry of the tile before was kept
                    return own[k] < start ? carry + (int64_t)i * dim : rows + (int64_t)(own[k] - start) * dim;
                };
                if (to > from) batches(from, to, row, i, use);
                if (seen > to && own[seen - 1] >= start)
                    std::memcpy(carry + (int64_t)i * dim, row(seen - 1), (size_t)dim * sizeof(Elem));
                cursor[i] = std::max(from, to);
            }
        }
    }

  private:
    // Asks for a row ahead of its use: most rows are on memory pages of their own, and finding those takes longer than
    // computing with them.
    void ask_for(int32_t position, int head) const {
        prefetch((const char *)source_.place(position, head), source_.rows.head_bytes);
    }

    template <class Row, class Use> void batches(int from, int to, Row row, int query, Use use) const {
        const Elem *rows[BATCH_KEYS + LANES];
        for (int at = from; at < to; at += BATCH_KEYS) {
            const int count = std::min(BATCH_KEYS, to - at);
            for (int k = 0; k < count; k++) rows[k] = row(at + k);
            for (int k = count; k < count + LANES; k++) rows[k] = rows[count - 1];
            use(query, at, at + count, rows);
        }
    }

    const Source<P> &source_;
    const Sets &sets_;
    int n_;
    AttendScratch &scratch_;
};

inline void count_keys(const Sets &sets, int n, int64_t *counts, bool shared) {
    for (int i = 0; i < n; i++)
        for (int k = 0; k < sets.sizes[i]; k++) {
            int64_t *count = counts + sets.positions[i * sets.stride + k];
            if (shared) __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
            else ++*count;
        }
}

// Tells the kernel which parts of a mapped file will be read, so that it reads them together and not one fault at a time.
inline void will_need(const KeyeRows &rows, const Sets &sets, int n) {
    constexpr uintptr_t SYSTEM_PAGE = 4096;
    for (int i = 0; i < n; i++) {
        uintptr_t from = 0, to = 0;
        for (int k = 0; k < sets.sizes[i]; k++) {
            uintptr_t row = (uintptr_t)row_of(rows, sets.positions[i * sets.stride + k]);
            uintptr_t begin = row / SYSTEM_PAGE * SYSTEM_PAGE;
            uintptr_t end = round_up((int64_t)(row + rows.row_bytes), SYSTEM_PAGE);
            if (begin > to || begin < from) {
                if (to) madvise((void *)from, to - from, MADV_WILLNEED);
                from = begin;
            }
            to = end;
        }
        if (to) madvise((void *)from, to - from, MADV_WILLNEED);
    }
}

// The products of one group of heads for the queries of a block: by tiles where the processor has them.
template <class P> class GroupProducts {
  public:
    using Elem = typename P::Elem;

    GroupProducts(const KeyeStep &step, const KeyeStretch &stretch, int n, int dim, int longest, AttendScratch &scratch)
        : heads(step.heads / stretch.k.heads), dim(dim), stride(round_up(longest, LANES) + LANES) {
#if defined(KEYE_AMX)
        tiles_ = P::PAIR == 2 && !(stretch.flags & KEYE_FIXED);
        padded_heads_ = (int)round_up(heads, TILE_SIDE);
        panels_ = scratch.panels.get((int64_t)n * padded_heads_ * dim);  // as far apart as the sums
        staging_ = scratch.staging.get((int64_t)BATCH_KEYS * dim);
        tile_begin();
#else
        padded_heads_ = heads;
#endif
        block = (int64_t)padded_heads_ * dim;
        queries_ = (Elem *)scratch.queries.get(n * block * (int64_t)sizeof(Elem) / 2);
        // A tile may read beyond the heads of the last query.
        logits_ = scratch.logits.get(((int64_t)n * heads + padded_heads_ - heads) * stride);
        sums_ = scratch.out.get(n * block);
        scale_ = vset1(LOG2_E / std::sqrt((float)step.dim));
    }

    // Takes the queries of one group, and clears the sums.
    void begin(const KeyeStep &step, int64_t token, int n, int head, bool rotated) {
        for (int i = 0; i < n; i++) load_queries<P>(step, token + i, head, heads, rotated, dim, queries_ + i * block);
#if defined(KEYE_AMX)
        if constexpr (P::PAIR == 2)
            for (int i = 0; i < n; i++) pack_heads(queries_ + i * block, heads, dim, panels_ + i * block);
#endif
        std::fill(sums_, sums_ + n * block, 0.0f);
    }

    // Logits of query i against entries from .. to of its set.
    void dot(int i, int from, int to, const Elem *const *rows) {
        float *to_logits = logits(i, 0) + from;
#if defined(KEYE_AMX)
        if constexpr (P::PAIR == 2)
            if (tiles_) {
                tile_dot(panels_ + i * block, heads, dim, rows, to - from, scale_, to_logits, stride, (Elem *)staging_);
                return;
            }
#endif
        dot_heads<P>(queries_ + i * block, heads, dim, rows, 0, to - from, scale_, to_logits, stride);
    }

    // Adds the weighted values of entries from .. to.
    void add(int i, int from, int to, const Elem *const *given) {
        alignas(64) static const Elem zeros[MAX_DIM] = {};
        const Elem *rows[BATCH_KEYS + LANES];
        std::copy(given, given + (to - from), rows);
        rows[to - from] = zeros;  // a last odd key is paired with nothing
        const float *weights = logits(i, 0) + from / P::PAIR;
        const int steps = (to - from + P::PAIR - 1) / P::PAIR;
#if defined(KEYE_AMX)
        if constexpr (P::PAIR == 2)
            if (tiles_) {
                tile_add(weights, stride, heads, rows, steps, dim, sums(i), staging_);
                return;
            }
#endif
        add_values_heads<P>(weights, stride, heads, rows, 0, steps, dim, sums(i));
    }

    float *logits(int i, int head) { return logits_ + ((int64_t)i * heads + head) * stride; }
    float *sums(int i) { return sums_ + i * block; }

    const int heads, dim;
    const int64_t stride;  // of one head's logits
    int64_t block;         // of one query's operands and sums

  private:
    Elem *queries_;
    float *logits_, *sums_;
    V scale_;
    int padded_heads_;
#if defined(KEYE_AMX)
    bool tiles_;
    float *panels_, *staging_;
#endif
};

// The rows of one query's set, a few at once, for every group: where they are, or decoded.
template <class P> class AloneRows {
  public:
    using Elem = typename P::Elem;

    AloneRows(const Source<P> &source, const int32_t *set, int size, Elem *copies)
        : source_(source), set_(set), size_(size), copies_(copies) {}

    // Calls use(group, from, count, rows, skip) for all groups and parts of the set; `rows` are followed by those of LANES
    // more that may be read. Pointers are written once for all groups: reading them at once would wait for the writing.
    template <class Use> void walk(int first_group, int last_group, Use use) const {
        const Elem *rows[ALONE_KEYS + LANES];
        const int groups = last_group - first_group;
        const int64_t head = source_.rows.head_bytes;
        const int most = source_.in_place ? ALONE_KEYS : DECODED_KEYS;
        for (int k = 0; k < most + LANES; k++) rows[k] = copies_ + (int64_t)std::min(k, most - 1) * source_.padded;
        for (int k = 0; k < ALONE_AHEAD; k++) ask_for(k, first_group, groups);
        for (int at = 0; at < size_; at += most) {
            const int count = std::min(most, size_ - at);
            if (source_.in_place)
                for (int k = 0; k < count + LANES; k++) rows[k] = source_.place(set_[at + std::min(k, count - 1)], 0);
            for (int g = 0; g < groups; g++) {
                for (int k = count * g / groups; k < count * (g + 1) / groups; k++)
                    ask_for(at + k + ALONE_AHEAD, first_group, groups);
                if (!source_.in_place)
                    for (int k = 0; k < count; k++)
                        source_.decode(set_[at + k], first_group + g, copies_ + (int64_t)k * source_.padded);
                use(g, at, count, rows, source_.in_place ? (first_group + g) * head / (int64_t)sizeof(Elem) : 0);
            }
        }
    }

  private:
    // Asks for what the groups need of a row ahead of its use.
    void ask_for(int k, int first_group, int groups) const {
        if (k < size_)
            prefetch((const char *)source_.place(set_[k], first_group), (int64_t)groups * source_.rows.head_bytes);
    }

    const Source<P> &source_;
    const int32_t *set_;
    int size_;
    Elem *copies_;
};

// Attention of one query for groups first_group .. last_group, each row read once for all of them. The arithmetic is that
// of a block's queries.
template <class P>
void attend_alone(const KeyeStep &step, const KeyeStretch &stretch, int64_t token, const int32_t *set, int size,
                  int first_group, int last_group, AttendScratch &scratch) {
    using Elem = typename P::Elem;
    const Source<P> keys(stretch.k, PAD_TO), values(stretch.v, PAD_TO);
    const int heads = step.heads / stretch.k.heads, dim = keys.padded, first = first_group * heads;
    const int all = (last_group - first_group) * heads;
    const int64_t stride = round_up(std::max(size, 1), LANES) + 2 * LANES;
    Elem *q = (Elem *)scratch.queries.get((int64_t)all * dim * (int64_t)sizeof(Elem) / 2);
    Elem *copies = (Elem *)scratch.gathered.get((int64_t)DECODED_KEYS * dim * (int64_t)sizeof(Elem) / 2);
    float *logits = scratch.logits.get((int64_t)all * stride), *sums = scratch.out.get((int64_t)all * dim);
    float *totals = scratch.totals.get(all);
    const V scale = vset1(LOG2_E / std::sqrt((float)step.dim));
    load_queries<P>(step, token, first, all, stretch.k.kind == KEYE_INT4, dim, q);
    std::fill(sums, sums + (int64_t)all * dim, 0.0f);
    AloneRows<P>(keys, set, size, copies)
        .walk(first_group, last_group, [&](int g, int at, int count, const Elem *const *rows, int64_t skip) {
            const int64_t h = (int64_t)g * heads;
            dot_heads<P>(q + h * dim, heads, dim, rows, skip, count, scale, logits + h * stride + at, stride);
        });
    for (int h = 0; h < all; h++) totals[h] = size ? softmax_row<P>(logits + h * stride, size) : 0;
    AloneRows<P>(values, set, size, copies)
        .walk(first_group, last_group, [&](int g, int at, int count, const Elem *const *rows, int64_t skip) {
            const int64_t h = (int64_t)g * heads;
            const int steps = (count + P::PAIR - 1) / P::PAIR;  // a last odd key is paired with itself, of weight 0
            add_values_heads<P>(logits + h * stride + at / P::PAIR, stride, heads, rows, skip, steps, dim, sums + h * dim);
        });
    write_outputs<P>(step, token, first, all, stretch.v.kind == KEYE_INT4, dim, sums, totals);
}

// Attention of queries begin .. begin + n of a stretch over their sets, written to step.out. A query without keys gives 0.
// Only groups first_group .. last_group are computed. `counts`, if not null, grows by one at every key of every set.
template <class P>
void attend_block(const KeyeStep &step, const KeyeStretch &stretch, int64_t begin, int n, const Sets &sets,
                  int first_group, int last_group, int64_t *counts, AttendScratch &scratch) {
    using Elem = typename P::Elem;
    Clock clock;
    if (stretch.flags & KEYE_WILL_NEED) {
        will_need(stretch.k, sets, n);
        will_need(stretch.v, sets, n);
    }
    if (n == 1) {
        attend_alone<P>(step, stretch, stretch.start + begin, sets.positions, sets.sizes[0], first_group, last_group,
                        scratch);
        if (counts) count_keys(sets, n, counts, step.threads > 1);
        clock.add(&Phases::attend);
        return;
    }
    const Source<P> keys(stretch.k, PAD_TO), values(stretch.v, PAD_TO);
    const int64_t token = stretch.start + begin, length = stretch.first + begin + n;
    const int longest = std::max(1, *std::max_element(sets.sizes, sets.sizes + n));
    const bool keys_rotated = stretch.k.kind == KEYE_INT4, values_rotated = stretch.v.kind == KEYE_INT4;
    GroupProducts<P> products(step, stretch, n, keys.padded, longest, scratch);
    const int heads = products.heads;
    float *totals = scratch.totals.get((int64_t)n * heads);
    const RowWalk<P> key_walk(keys, sets, n, scratch), value_walk(values, sets, n, scratch);
    const int total = key_walk.number_union(length);
    auto dot = [&](int i, int from, int to, const Elem *const *rows) { products.dot(i, from, to, rows); };
    auto add = [&](int i, int from, int to, const Elem *const *rows) { products.add(i, from, to, rows); };
    for (int g = first_group; g < last_group; g++) {
        products.begin(step, token, n, g * heads, keys_rotated);
        key_walk.gathered(g, total, dot);
        for (int i = 0; i < n; i++)
            for (int h = 0; h < heads; h++)
                totals[i * heads + h] = sets.sizes[i] ? softmax_row<P>(products.logits(i, h), sets.sizes[i]) : 0;
        value_walk.gathered(g, total, add);
        for (int i = 0; i < n; i++)
            write_outputs<P>(step, token + i, g * heads, heads, values_rotated, keys.padded, products.sums(i),
                             totals + i * heads);
    }
    if (counts) count_keys(sets, n, counts, step.threads > 1);
    clock.add(&Phases::attend);
}

}  // namespace keye
