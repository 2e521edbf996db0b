// The running top-k of one query over a stream of scores in order of position.
//
// Candidates are in order of position. A later key that equals the k-th best so far loses against it, so only scores
// strictly above it are kept; when the buffer is full, the k best stay and the threshold rises.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include "product.h"

namespace keye {

struct Candidates {
    float *scores;       // room for capacity + LANES entries
    int32_t *positions;
    int count, capacity;
    float threshold;     // only scores above it are candidates

    void begin(float *s, int32_t *p, int room) {
        scores = s;
        positions = p;
        count = 0;
        capacity = room;
        threshold = -INFINITY;
    }
};

// Entries beyond k that a buffer should hold, so that selecting is rare.
inline int topk_capacity(int topk) { return (int)((topk + std::max(topk, 512) + 63) / 64 * 64); }

// The smallest key that is among the k largest of `n` (k <= n); `above` counts the keys greater than it.
inline int32_t kth_largest(const int32_t *keys, int padded, int topk, int *above) {
    // Invariant: count(> high) < k <= count(> low), as wide integers so that no difference overflows.
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int i = 0; i < padded; i++) {
        most = std::max(most, keys[i]);
        least = std::min(least, keys[i] == INT32_MIN ? INT32_MAX : keys[i]);  // the padding does not count
    }
    int64_t low = (int64_t)least - 1, high = most;
    *above = 0;
    while (high - low > 1) {
        int32_t middle = (int32_t)(low + (high - low) / 2);
        int count = 0;
        for (int i = 0; i < padded; i += LANES) count += vcount_greater(keys + i, middle);
        if (count >= topk) {
            low = middle;
        } else {
            high = middle;
            *above = count;
        }
    }
    return (int32_t)high;
}

// Keeps the k best candidates, the earlier of equals, still in order of position. `keys` has room for capacity + LANES.
inline void keep_best(Candidates &c, int topk, int32_t *keys) {
    if (c.count <= topk) return;
    int padded = (c.count + LANES - 1) / LANES * LANES;
    for (int i = 0; i < padded; i += LANES) vorder(c.scores + i, keys + i);
    for (int i = c.count; i < padded; i++) keys[i] = INT32_MIN;  // below every score, which are finite
    int above, kept = 0;
    int32_t kth = kth_largest(keys, padded, topk, &above);
    int equal_left = topk - above;
    for (int i = 0; i < padded; i += LANES) {
        uint32_t take = vkeys_greater(keys + i, kth), equal = vkeys_equal(keys + i, kth);
        for (; equal && equal_left; equal &= equal - 1, equal_left--) take |= equal & (0u - equal);
        if (take) kept += vcompress_pair(take, c.scores + i, c.positions + i, c.scores + kept, c.positions + kept);
    }
    c.count = kept;
    int32_t bits = kth ^ (int32_t)((uint32_t)(kth >> 31) >> 1);
    std::memcpy(&c.threshold, &bits, 4);
}

// Offers LANES scores at positions first + lane; lanes outside `valid` are ignored. NaN counts as the smallest score,
// and -0 as 0.
inline void offer(Candidates &c, V scores, int32_t first, uint32_t valid) {
    V s = vadd(vmax(scores, vset1(-FLT_MAX)), vzero());
    uint32_t mask = vgreater(s, vset1(c.threshold)) & valid;
    if (mask) c.count += vcompress(mask, s, first, c.scores + c.count, c.positions + c.count);
}

}  // namespace keye
