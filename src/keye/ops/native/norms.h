// Norms of rows with the small operations around them, in one pass: an addition before, and behind it a rotary embedding
// and a Hadamard transform. Every result is rounded to the dtype where the definition in torch rounds it.
#pragma once
#include "memory.h"
#include "rows.h"
#include "threads.h"

namespace keye {

struct NormScratch {
    Buffer<float> numbers, weight, bias;
    Buffer<char> rounded;
};

// One row of one head; `weight` and `bias` as float32, where there are any.
class NormRow {
  public:
    NormRow(const KeyeNorm &call, NormScratch &scratch, const float *weight, const float *bias)
        : call_(call), dim_((int)call.dim), weight_(weight), bias_(bias), y_(scratch.numbers.get(call.dim)),
          rounded_(scratch.rounded.get(4 * call.dim)) {}

    void compute(int64_t row, int64_t head) {
        const int64_t to = (row * call_.heads + head) * dim_;
        load_plain(call_.dtype, call_.x, row * call_.stride + head * dim_, dim_, y_);
        if (call_.delta) add(to);
        normalise();
        round();
        if (call_.cos) rotate(call_.cos + row * (dim_ / 2), call_.sin + row * (dim_ / 2));
        if (call_.has_hadamard) {
            round();
            hadamard(y_, dim_);
        }
        store_plain(call_.dtype, call_.out, to, dim_, y_);
    }

  private:
    void round() {
        if (call_.dtype == KEYE_FLOAT32) return;
        store_plain(call_.dtype, rounded_, 0, dim_, y_);
        load_plain(call_.dtype, rounded_, 0, dim_, y_);
    }

    // The sum is an output too.
    void add(int64_t to) {
        float *other = (float *)rounded_;
        load_plain(call_.dtype, call_.delta, to, dim_, other);
        for (int i = 0; i < dim_; i += LANES) vstore(y_ + i, vadd(vload(y_ + i), vload(other + i)));
        store_plain(call_.dtype, call_.sum, to, dim_, y_);
        load_plain(call_.dtype, call_.sum, to, dim_, y_);
    }

    void normalise() {
        V total = vzero();
        if (call_.is_centred) {
            for (int i = 0; i < dim_; i += LANES) total = vadd(total, vload(y_ + i));
            const V mean = vset1(vsum(total) / (float)dim_);
            for (int i = 0; i < dim_; i += LANES) vstore(y_ + i, vsub(vload(y_ + i), mean));
            total = vzero();
        }
        for (int i = 0; i < dim_; i += LANES) total = vfma(vload(y_ + i), vload(y_ + i), total);
        const V scale = vset1(1.0f / std::sqrt(vsum(total) / (float)dim_ + call_.eps));
        for (int i = 0; i < dim_; i += LANES) {
            V x = vmul(vmul(vload(y_ + i), scale), vload(weight_ + i));
            vstore(y_ + i, bias_ ? vadd(x, vload(bias_ + i)) : x);
        }
    }

    void rotate(const float *cos, const float *sin) {
        const int half = dim_ / 2;
        for (int i = 0; i < half; i += LANES) {
            const V a = vload(y_ + i), b = vload(y_ + half + i), c = vload(cos + i), s = vload(sin + i);
            vstore(y_ + i, vsub(vmul(a, c), vmul(b, s)));
            vstore(y_ + half + i, vadd(vmul(b, c), vmul(a, s)));
        }
    }

    const KeyeNorm &call_;
    const int dim_;
    const float *weight_, *bias_;
    float *y_;
    char *rounded_;
};

}  // namespace keye
