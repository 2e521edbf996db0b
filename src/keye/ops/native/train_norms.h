// Gradients of norms of rows and of what follows them (norms.h), recomputed from the rows: one pass where autograd takes
// two dozen.
#pragma once
#include "attend.h"
#include "memory.h"
#include "rows.h"
#include "threads.h"
#include "train.h"

namespace keye {

struct NormGradientScratch {
    Buffer<float> x, grad, weight;
};

// One row of one head; `weight` in float32. Adds to the gradients of weight and bias.
class NormGradient {
  public:
    NormGradient(const KeyeNormBackward &call, NormGradientScratch &scratch, const float *weight, float *grad_weight,
                 float *grad_bias)
        : call_(call), dim_((int)call.dim), weight_(weight), x_(scratch.x.get(call.dim)),
          grad_(scratch.grad.get(call.dim)), grad_weight_(grad_weight), grad_bias_(grad_bias) {}

    void compute(int64_t row, int64_t head) {
        const int64_t at = (row * call_.heads + head) * dim_;
        load_plain(call_.dtype, call_.x, row * call_.stride + head * dim_, dim_, x_);
        load_plain(call_.dtype, call_.grad, at, dim_, grad_);
        if (call_.has_hadamard) hadamard(grad_, dim_);
        if (call_.cos) rotate_back(call_.cos + row * (dim_ / 2), call_.sin + row * (dim_ / 2));
        normalise_back();
        if (call_.grad_sum) {
            load_plain(call_.dtype, call_.grad_sum, at, dim_, x_);
            for (int i = 0; i < dim_; i += LANES) vstore(grad_ + i, vadd(vload(grad_ + i), vload(x_ + i)));
        }
        store_plain(call_.dtype, call_.grad_x, at, dim_, grad_);
    }

  private:
    void rotate_back(const float *cos, const float *sin) {
        const int half = dim_ / 2;
        for (int i = 0; i < half; i += LANES) {
            const V a = vload(grad_ + i), b = vload(grad_ + half + i), c = vload(cos + i), s = vload(sin + i);
            vstore(grad_ + i, vadd(vmul(a, c), vmul(b, s)));
            vstore(grad_ + half + i, vsub(vmul(b, c), vmul(a, s)));
        }
    }

    // With n the normalised row, r its scale and d the gradient of n: r * (d - n mean(d n)), and where the norm is centred
    // without the mean of d.
    void normalise_back() {
        const V share = vset1(1.0f / (float)dim_);
        V total = vzero();
        if (call_.is_centred) {
            for (int i = 0; i < dim_; i += LANES) total = vadd(total, vload(x_ + i));
            const V mean = vset1(vsum(total) / (float)dim_);
            for (int i = 0; i < dim_; i += LANES) vstore(x_ + i, vsub(vload(x_ + i), mean));
        }
        total = vzero();
        for (int i = 0; i < dim_; i += LANES) total = vfma(vload(x_ + i), vload(x_ + i), total);
        const V scale = vset1(1.0f / std::sqrt(vsum(total) / (float)dim_ + call_.eps));
        V along = vzero(), sum = vzero();
        for (int i = 0; i < dim_; i += LANES) {
            const V n = vmul(vload(x_ + i), scale), g = vload(grad_ + i), d = vmul(g, vload(weight_ + i));
            vstore(grad_weight_ + i, vfma(g, n, vload(grad_weight_ + i)));
            if (grad_bias_) vstore(grad_bias_ + i, vadd(g, vload(grad_bias_ + i)));
            vstore(x_ + i, n);
            vstore(grad_ + i, d);
            along = vfma(d, n, along);
            sum = vadd(sum, d);
        }
        along = vmul(vset1(vsum(along)), share);
        sum = call_.is_centred ? vmul(vset1(vsum(sum)), share) : vzero();
        for (int i = 0; i < dim_; i += LANES) {
            const V d = vsub(vload(grad_ + i), sum);
            vstore(grad_ + i, vmul(scale, vsub(d, vmul(vload(x_ + i), along))));
        }
    }

    const KeyeNormBackward &call_;
    const int dim_;
    const float *weight_;
    float *x_, *grad_, *grad_weight_, *grad_bias_;
};

inline int norm_backward(const KeyeNormBackward &call, NormGradientScratch &(*scratch_of)()) {
    constexpr int64_t SOME = 1 << 16;  // numbers that a thread takes at once, and that are summed apart
    const int64_t rows = std::max<int64_t>(1, SOME / (call.heads * call.dim)), items = (call.rows + rows - 1) / rows;
    const int64_t width = 2 * call.dim;
    std::vector<float> parts((size_t)(items * width), 0.0f), weight((size_t)call.dim);
    load_plain(call.weight_dtype, call.weight, 0, (int)call.dim, weight.data());
    const int failed = run(items, items < 8 ? 1 : call.threads, [&](int64_t item) {
        float *part = parts.data() + item * width;
        NormGradient gradient(call, scratch_of(), weight.data(), part, call.grad_bias ? part + call.dim : nullptr);
        for (int64_t row = item * rows; row < std::min(call.rows, (item + 1) * rows); row++)
            for (int64_t head = 0; head < call.heads; head++) gradient.compute(row, head);
    });
    for (int64_t d = 0; d < call.dim; d++) {
        float sum = 0, bias = 0;
        for (int64_t item = 0; item < items; item++) {
            sum += parts[(size_t)(item * width + d)];
            bias += parts[(size_t)(item * width + call.dim + d)];
        }
        call.grad_weight[d] = sum;
        if (call.grad_bias) call.grad_bias[d] = bias;
    }
    return failed;
}

inline int swiglu_backward(const KeyeSwigluBackward &call) {
    constexpr int64_t SOME = 1 << 16;
    const int64_t rows = std::max<int64_t>(1, SOME / call.inner), items = (call.rows + rows - 1) / rows;
    return run(items, items < 8 ? 1 : call.threads, [&](int64_t item) {
        for (int64_t row = item * rows; row < std::min(call.rows, (item + 1) * rows); row++)
            for (int64_t i = 0; i < call.inner; i += 16) {
                float gate[16], up[16], grad[16];
                const int64_t at = row * 2 * call.inner + i;
                load_plain(call.dtype, call.gate_up, at, 16, gate);
                load_plain(call.dtype, call.gate_up, at + call.inner, 16, up);
                load_plain(call.dtype, call.grad, row * call.inner + i, 16, grad);
                const V one = vset1(1);
                for (int c = 0; c < 16; c += LANES) {
                    const V x = vload(gate + c), g = vload(grad + c), e = vmul(x, vset1(-LOG2_E));
                    // 1 / (1 + 2 ** e), by the power that does not overflow.
                    const V small = vexp2(vmin(e, vsub(vzero(), e))), inverse = vdiv(one, vadd(one, small));
                    const V sigmoid = vselect(vgreater(e, vzero()), vmul(small, inverse), inverse);
                    const V silu = vmul(x, sigmoid), slope = vmul(sigmoid, vadd(one, vsub(x, silu)));
                    vstore(grad + c, vmul(g, silu));
                    vstore(gate + c, vmul(vmul(g, vload(up + c)), slope));
                }
                store_plain(call.dtype, call.grad_gate_up, at, 16, gate);
                store_plain(call.dtype, call.grad_gate_up, at + call.inner, 16, grad);
            }
    });
}

}  // namespace keye
