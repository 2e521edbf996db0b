// The plain C interface of the compiled core. Knows addresses and numbers; knows nothing of torch or Python.
//
// Every structure mirrors a ctypes.Structure in keye/ops/cpu/backend.py, field by field.
#pragma once
#include <cstdint>

extern "C" {

// Number formats, as in keye/ops/kv_blocks.py. The first three are also the dtypes of queries and outputs.
enum KeyeKind { KEYE_FLOAT32 = 0, KEYE_FLOAT16 = 1, KEYE_BFLOAT16 = 2, KEYE_FP8 = 3, KEYE_INT8 = 4, KEYE_INT4 = 5 };

enum KeyeKernel { KEYE_AUTO = 0, KEYE_UNION = 1, KEYE_MASKED = 2 };

enum KeyeFlags {
    KEYE_FIXED = 1,      // results of a query must not depend on its neighbours
    KEYE_WILL_NEED = 2,  // rows are in a mapped file: ask the kernel for the selected ones before reading them
};

// Rows of 64 tokens a KV block. Token t is row t % 64 of the block that begins at address blocks[t / 64].
struct KeyeRows {
    const int64_t *blocks;
    int64_t row_bytes;
    int32_t kind, heads, dim, head_bytes;
};

// Tokens start .. stop of a step; the first is at absolute position `first` of its sequence. `sets` int32
// [stop - start, step.topk], ascending and -1 behind the last, are only read by keye_attend and written by keye_select.
struct KeyeStretch {
    int64_t start, stop, first;
    KeyeRows k, v, indexer_k;
    int64_t *counts;
    int32_t *sets;
    int64_t flags;
};

// q, out [T, heads, dim]; indexer_q [T, indexer_heads, indexer_dim]; gate float32 [T, indexer_heads]; all contiguous.
struct KeyeStep {
    const void *q, *indexer_q;
    const float *gate;
    void *out;
    int32_t dtype, indexer_dtype, heads, dim, indexer_heads, indexer_dim, topk, kernel, threads, masked_below;
};

// Seconds that the calling process spent in each phase, over all threads, since the last keye_timers call.
struct KeyeTimers {
    double score, select, attend, dense;
};

// bfloat16: x [rows, columns], weight [outputs, columns], bias [outputs] or null; out [rows, outputs] of out_dtype
// (KEYE_BFLOAT16 or KEYE_FLOAT32). Columns are a multiple of 32.
struct KeyeLinear {
    const void *x, *weight, *bias;
    void *out;
    int64_t rows, columns, outputs, threads, out_dtype;
};

// bfloat16: x, out [tokens, width]; expert e is [2 * inner, width] (gates, then ups) at gate_up + e * gate_up_bytes and
// [width, inner] at down + e * down_bytes. chosen int64 and weights float32 [tokens, top_k]. Width and inner are
// multiples of 32.
struct KeyeExperts {
    const void *x, *gate_up, *down;
    const int64_t *chosen;
    const float *weights;
    void *out;
    int64_t gate_up_bytes, down_bytes, experts, tokens, top_k, width, inner, threads;
};

// Rows [rows, heads, dim] of x, `stride` numbers apart, to contiguous `out`, all of one dtype: with `delta` it is added
// first and the sum written to `sum`, then norm over dim (`is_centred`: with its mean), times weight [dim], plus bias,
// rotary embedding by cos and sin [rows, dim / 2], Hadamard transform; null pointers leave a part out. dim is a multiple
// of 32.
struct KeyeNorm {
    const void *x, *delta, *weight, *bias;
    const float *cos, *sin;
    void *out, *sum;
    int64_t rows, heads, dim, stride;
    float eps;
    int32_t dtype, weight_dtype, is_centred, has_hadamard, threads;
};

// Weights of `matrices` matrices [outputs, inner], packed by keye_quant_pack (see quant.h). `bits` 4 or 8; `step` 16, 32
// or 64 columns share a scale in memory; scale_kind is that of scales and minima.
struct KeyeQuant {
    const void *data;
    int64_t matrices, outputs, inner;
    int32_t bits, step, has_minimum, scale_kind;
};

// The same in the layout of files: codes uint8 [matrices, outputs, ceil(inner / 2)] or int8 [matrices, outputs, inner],
// scales and minima [matrices, outputs, groups] of `group` columns each, in the packed weights' scale_kind. Packing reads
// them, unpacking writes them.
struct KeyeQuantSource {
    void *codes, *scales, *minima;
    int64_t group, groups, threads;
};

// x [rows, inner] and out [rows, outputs] of one dtype. With `sizes` [matrices] the rows are sorted by matrix; without,
// all belong to the first. bias [outputs] or null.
struct KeyeQuantRows {
    const void *x;
    void *out;
    const float *bias;
    const int64_t *sizes;
    int64_t rows;
    int32_t dtype, threads;
};

// Routed experts: x and out [tokens, width] of one dtype; chosen [tokens, top_k] are matrices, weights those of the sum.
// gate_up has the gate in the first half of its outputs, which must be a multiple of 32; its half is what down reads.
struct KeyeQuantExperts {
    const void *x;
    void *out;
    const int64_t *chosen;
    const float *weights;
    int64_t tokens;
    int32_t top_k, dtype, threads;
};

// x of `dtype` [vectors, dim] as int8 or int4 codes, each vector in head_bytes of `out`; dim is a multiple of 32.
struct KeyeEncode {
    const void *x;
    void *out;
    int64_t vectors, dim, head_bytes, dtype, kind;
};

void keye_encode_rows(const KeyeEncode *call);

// All return 0, or 1 when memory ran out.
int keye_norm(const KeyeNorm *call);
int keye_linear(const KeyeLinear *call);
int keye_mix_experts(const KeyeExperts *call);
int keye_dense(const KeyeStep *step, const KeyeStretch *stretches, int64_t count);
int keye_sparse(const KeyeStep *step, const KeyeStretch *stretches, int64_t count);
int keye_select(const KeyeStep *step, const KeyeStretch *stretches, int64_t count);
int keye_attend(const KeyeStep *step, const KeyeStretch *stretches, int64_t count);
// Groups of weights x [count, n], as in keye/ops/cpu/scales.py; the best scales are symmetric where `minima` is null.
void keye_search_scales(const float *x, int64_t count, int32_t n, float low, float high, float *scales, float *minima);
void keye_encode(const float *x, int64_t count, int32_t n, float low, float high, const float *scales,
                 const float *minima, uint8_t *codes);
void keye_timers(KeyeTimers *timers);
int keye_quant_pack(const KeyeQuant *weights, const KeyeQuantSource *from);
int keye_quant_unpack(const KeyeQuant *weights, const KeyeQuantSource *to);
int keye_quant_matmul(const KeyeQuant *weights, const KeyeQuantRows *call);
int keye_quant_experts(const KeyeQuant *gate_up, const KeyeQuant *down, const KeyeQuantExperts *call);
// Bytes of packed weights; `data` is not read.
int64_t keye_quant_bytes(const KeyeQuant *weights);
const char *keye_variant();
}
