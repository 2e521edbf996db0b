// The interface of attention in training: forward and backward passes over sets of keys. What is computed, and the loss of
// the indexer, is said in keye/ops/tree.py; keye/ops/cpu/train.py mirrors the structure.
#pragma once
#include <cstdint>

extern "C" {

// q, out and their gradients [queries, heads, dim], k and v [keys, groups, dim], indexer_q [queries, indexer_heads,
// indexer_dim], indexer_k [keys, indexer_dim], gate float32 [queries, indexer_heads]; sets int32 [queries, width] are rows
// of the keys, then -1. k, v and indexer_k are of the dtype that keye_train_rows gives for `dtype`, all others of `dtype`
// unless said otherwise. Dimensions are multiples of 32. lse [queries, heads] and indexer_lse [queries] are
// logarithms to base 2, infinite for queries without keys. Without indexer_q nothing is taught.
//
// A backward pass computes the gradients of q, k and v where grad_q is not null, and those of the indexer where
// grad_indexer_q is not null; grad_k, grad_v and grad_indexer_k are of `dtype`, grad_gate is float32.
//
// Dense attention (`sets` null, or, in a forward pass that only replaces outputs, read as masks) goes by blocks of queries.
// A block is some pieces, runs of queries, whose segments have the same ancestors: the rows of its intervals, in order. A
// piece's own keys follow them, from own_row on; its first query sees own_before of them and the next one.
struct KeyeTrainBlock {
    int64_t first_piece, last_piece, first_interval, last_interval;
};
struct KeyeTrainPiece {
    int64_t query, count, own_row, own_before;
};
struct KeyeTrainInterval {
    int64_t start, stop;
};

struct KeyeTrain {
    const void *q, *k, *v, *indexer_q, *indexer_k;
    const float *gate;
    const int32_t *sets;
    void *out;
    float *lse, *indexer_lse;
    const void *grad_out;
    void *grad_q, *grad_k, *grad_v, *grad_indexer_q, *grad_indexer_k;
    float *grad_gate;
    const KeyeTrainBlock *blocks;
    const KeyeTrainPiece *pieces;
    const KeyeTrainInterval *intervals;
    int64_t queries, keys, width, block_count;
    double kl;  // the loss after a forward pass; its gradient before a backward pass
    int32_t dtype, heads, groups, dim, indexer_heads, indexer_dim, threads, reserved;
};

// Gradients of KeyeNorm (keye.h): of x, which with grad_sum is the sum and has that gradient too, contiguous, and float32
// [dim] those of weight and, where grad_bias is not null, bias.
struct KeyeNormBackward {
    const void *x, *weight, *grad, *grad_sum;
    const float *cos, *sin;
    void *grad_x;
    float *grad_weight, *grad_bias;
    int64_t rows, heads, dim, stride;
    float eps;
    int32_t dtype, weight_dtype, is_centred, has_hadamard, threads;
};

// Gradient [rows, 2 * inner] of gate_up, gates in the first half, from that of silu(gate) * up [rows, inner]; inner is a
// multiple of 16.
struct KeyeSwigluBackward {
    const void *gate_up, *grad;
    void *grad_gate_up;
    int64_t rows, inner;
    int32_t dtype, threads;
};

// The dtype that rows of keys must have for tensors of a dtype.
int keye_train_rows(int dtype);
// All return 0, or 1 when memory ran out.
int keye_train_forward(KeyeTrain *call);
int keye_train_backward(const KeyeTrain *call);
int keye_swiglu_backward(const KeyeSwigluBackward *call);
int keye_norm_backward(const KeyeNormBackward *call);
}
