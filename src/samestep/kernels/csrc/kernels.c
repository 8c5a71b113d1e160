/* All kernels for one instruction set: one unit, compiled once for each (-DISA=v4
 * -march=...). Files use what those above them define. */
#include <stddef.h>

#include "samestep.h"
#include "vector.h"

#define NAME_OF(isa) samestep_##isa
#define NAME(isa) NAME_OF(isa)
#define TEXT_OF(isa) #isa
#define TEXT(isa) TEXT_OF(isa)

#include "functions.h"
#include "draws.h"
#include "reductions.h"
#include "tiles.h"
#include "transpose.c"
#include "products.c"
#include "weights.c"
#include "elementwise.c"
#include "gelu.h"
#include "pointwise.c"
#include "vertical.h"
#include "matmul.c"
#include "combine.c"
#include "gather.c"
#include "pool.c"
#include "conv_terms.h"
#include "conv.c"
#include "conv_weights.c"
#include "conv_pool.c"
#include "norms.c"
#include "layer_norm.c"
#include "batch_norm_2d.c"
#include "recurrent.c"
#include "loss.c"
#include "attention.c"
#include "embedding.c"
#include "optimizer.c"
#include "updates.c"

typedef void (*Operation)(const Op *, const Call *);

static const Operation operations[NUM_OPS] = {
    [OP_GATHER_BYTES] = op_gather_bytes,
    [OP_LOAD] = op_load,
    [OP_STORE] = op_store,
    [OP_TRANSPOSE] = op_transpose,
    [OP_LINEAR] = op_linear,
    [OP_LINEAR_GRAD_INPUT] = op_linear_grad_input,
    [OP_LINEAR_GRAD_WEIGHT] = op_linear_grad_weight,
    [OP_GRAD_BIAS] = op_grad_bias,
    [OP_BATCH_NORM] = op_batch_norm,
    [OP_BATCH_NORM_GRAD] = op_batch_norm_grad,
    [OP_CROSS_ENTROPY] = op_cross_entropy,
    [OP_SQUARED_ERROR] = op_squared_error,
    [OP_ACTIVATE] = op_activate,
    [OP_GATE] = op_gate,
    [OP_CONV_MAX_POOL] = op_conv_max_pool,
    [OP_MAX_POOL] = op_max_pool,
    [OP_MAX_POOL_GRAD] = op_max_pool_grad,
    [OP_MEAN_POOL] = op_mean_pool,
    [OP_MEAN_POOL_GRAD] = op_mean_pool_grad,
    [OP_BATCH_NORM_2D] = op_batch_norm_2d,
    [OP_BATCH_NORM_2D_GRAD] = op_batch_norm_2d_grad,
    [OP_ATTENTION] = op_attention,
    [OP_ATTENTION_GRAD] = op_attention_grad,
    [OP_CONV] = op_conv,
    [OP_CONV_GRAD_INPUT] = op_conv_grad_input,
    [OP_CONV_GRAD_WEIGHT] = op_conv_grad_weight,
    [OP_SUM_ROWS] = op_sum_rows,
    [OP_DRAW] = op_draw,
    [OP_COMBINE] = op_combine,
    [OP_UNARY] = op_unary,
    [OP_BINARY] = op_binary,
    [OP_MATMUL] = op_matmul,
    [OP_SOFTMAX] = op_softmax,
    [OP_ADD_LEAVES] = op_add_leaves,
    [OP_LAYER_NORM] = op_layer_norm,
    [OP_LAYER_NORM_GRAD] = op_layer_norm_grad,
    [OP_LOAD_TOKENS] = op_load_tokens,
    [OP_EMBEDDING] = op_embedding,
    [OP_EMBEDDING_GRAD] = op_embedding_grad,
    [OP_LSTM] = op_lstm,
    [OP_LSTM_GRAD] = op_lstm_grad,
    [OP_GRU] = op_gru,
    [OP_GRU_GRAD] = op_gru_grad,
    [OP_RNN] = op_rnn,
    [OP_RNN_GRAD] = op_rnn_grad,
    [OP_MEASURE] = op_measure,
    [OP_PICK] = op_pick,
    [OP_PICK_GRAD] = op_pick_grad,
};

/* Every micro-batch's gradient is left, and has a slot of its own in a buffer. */
static void run_leaves(const Op *op, const Call *call) {
    float *slots[call->micro_batches];
    int64_t merges[call->micro_batches];
    for (int64_t m = 0; m < call->micro_batches; m++) {
        int64_t leaf = op->i[27] * call->micro_batches + m;
        slots[m] = call->buffers[op->i[29]] + leaf * op->i[28];
        merges[m] = 0;
    }
    Call leaves = *call;
    leaves.slots = slots, leaves.merges = merges;
    leaves.slots_size = (int32_t)call->micro_batches;
    operations[op->kind](op, &leaves);
}
static void run_op(const Op *op, const Call *call) {
    if (op->flags & OP_LEAVES)
        run_leaves(op, call);
    else
        operations[op->kind](op, call);
}

static int64_t run(const Op *ops, int64_t num_ops, const Call *call) {
    for (int64_t n = 0; n < num_ops; n++)
        if (ops[n].kind < 0 || ops[n].kind >= NUM_OPS || !operations[ops[n].kind])
            return n + 1;
    Mode before = enter_default_mode();
    for (int64_t n = 0; n < num_ops; n++) run_op(&ops[n], call);
    leave_default_mode(before);
    return 0;
}

/* The kernels called by themselves, in the default mode of floating point. */
#define IN_DEFAULT_MODE(call)          \
    Mode before = enter_default_mode(); \
    call;                              \
    leave_default_mode(before)

static void run_tree_sum(float *out, const float *const *leaves, const int32_t *order,
                         int64_t order_size, int64_t size) {
    IN_DEFAULT_MODE(tree_sum(out, leaves, order, order_size, size));
}
static void run_update(const Optimizer *how, const float *const *leaves,
                       const int32_t *order, int64_t order_size, float *parameters,
                       float *state1, float *state2, int64_t first, int64_t size,
                       Hashes *hashes) {
    IN_DEFAULT_MODE(update(how, leaves, order, order_size, parameters, state1, state2,
                           first, size, hashes));
}
static void run_update_parts(const Update *with) {
    IN_DEFAULT_MODE(update_parts(with));
}
static void run_average(float *mean, const float *parameters, float weight,
                        int64_t size) {
    IN_DEFAULT_MODE(average(mean, parameters, weight, size));
}
static void run_squared_norms(const float *vector, double *squares, int64_t blocks) {
    IN_DEFAULT_MODE(squared_norms(vector, squares, blocks));
}
static void run_scale(float *vector, float factor, int64_t size) {
    IN_DEFAULT_MODE(scale(vector, factor, size));
}
static uint64_t run_hash(const uint32_t *keys, const float *words, int64_t first,
                         int64_t size) {
    return hash_vector(keys, words, first, size);
}
static int run_function(int32_t number, const float *x, float *y, int64_t size) {
    IN_DEFAULT_MODE(int known = function(number, x, y, size));
    return known;
}

extern const Kernels NAME(ISA);
const Kernels NAME(ISA) = {
    .isa = TEXT(ISA),
    .run = run,
    .tree_sum = run_tree_sum,
    .update = run_update,
    .update_parts = run_update_parts,
    .average = run_average,
    .squared_norms = run_squared_norms,
    .scale = run_scale,
    .hash = run_hash,
    .function = run_function,
};
