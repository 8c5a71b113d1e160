/* All kernels for one instruction set, compiled once for each: -DISA=v4 -march=... */
#include <stddef.h>

#include "samestep.h"
#include "vector.h"

#define NAME_OF(isa) samestep_##isa
#define NAME(isa) NAME_OF(isa)
#define TEXT_OF(isa) #isa
#define TEXT(isa) TEXT_OF(isa)

/* Until every file is there: operations without one are unknown, functions are NULL. */
#if __has_include("functions.h")
#include "functions.h"
#define HAS_FUNCTIONS
#endif
#if __has_include("draws.h")
#include "draws.h"
#endif
#include "reductions.h"
#include "tiles.h"
#include "transpose.c"
#include "products.c"
#include "weights.c"
#if __has_include("elementwise.c")
#include "elementwise.c"
#define HAS_ELEMENTWISE
#endif
#if __has_include("gather.c")
#include "gather.c"
#define HAS_GATHER
#endif
#if __has_include("norms.c")
#include "norms.c"
#define HAS_NORMS
#endif
#if __has_include("loss.c")
#include "loss.c"
#define HAS_LOSS
#endif
#if __has_include("optimizer.c")
#include "optimizer.c"
#define HAS_OPTIMIZER
#endif

typedef void (*Operation)(const Op *, const Call *);

static const Operation operations[NUM_OPS] = {
#ifdef HAS_GATHER
    [OP_GATHER_BYTES] = op_gather_bytes,
    [OP_LOAD] = op_load,
    [OP_STORE] = op_store,
#endif
    [OP_TRANSPOSE] = op_transpose,
    [OP_LINEAR] = op_linear,
    [OP_LINEAR_GRAD_INPUT] = op_linear_grad_input,
    [OP_LINEAR_GRAD_WEIGHT] = op_linear_grad_weight,
    [OP_GRAD_BIAS] = op_grad_bias,
#ifdef HAS_NORMS
    [OP_BATCH_NORM] = op_batch_norm,
    [OP_BATCH_NORM_GRAD] = op_batch_norm_grad,
#endif
#ifdef HAS_LOSS
    [OP_CROSS_ENTROPY] = op_cross_entropy,
    [OP_SQUARED_ERROR] = op_squared_error,
#endif
#ifdef HAS_ELEMENTWISE
    [OP_ACTIVATE] = op_activate,
    [OP_GATE] = op_gate,
#endif
};

static int64_t run(const Op *ops, int64_t num_ops, const Call *call) {
    for (int64_t n = 0; n < num_ops; n++)
        if (ops[n].kind < 0 || ops[n].kind >= NUM_OPS || !operations[ops[n].kind])
            return n + 1;
    Mode before = enter_default_mode();
    for (int64_t n = 0; n < num_ops; n++) operations[ops[n].kind](&ops[n], call);
    leave_default_mode(before);
    return 0;
}

/* The kernels called by themselves, in the default mode of floating point. */
#define IN_DEFAULT_MODE(call)          \
    Mode before = enter_default_mode(); \
    call;                              \
    leave_default_mode(before)

#ifdef HAS_OPTIMIZER
static void run_tree_sum(float *out, const float *const *leaves, const int32_t *order,
                         int64_t order_size, int64_t size) {
    IN_DEFAULT_MODE(tree_sum(out, leaves, order, order_size, size));
}
static void run_update(const Optimizer *how, const float *const *leaves,
                       const int32_t *order, int64_t order_size, float *parameters,
                       float *state1, float *state2, int64_t size) {
    IN_DEFAULT_MODE(
        update(how, leaves, order, order_size, parameters, state1, state2, size));
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
#endif
#ifdef HAS_FUNCTIONS
static int run_function(int32_t number, const float *x, float *y, int64_t size) {
    IN_DEFAULT_MODE(int known = function(number, x, y, size));
    return known;
}
#endif

extern const Kernels NAME(ISA);
const Kernels NAME(ISA) = {
    .isa = TEXT(ISA),
    .run = run,
#ifdef HAS_OPTIMIZER
    .tree_sum = run_tree_sum,
    .update = run_update,
    .average = run_average,
    .squared_norms = run_squared_norms,
    .scale = run_scale,
#endif
#ifdef HAS_FUNCTIONS
    .function = run_function,
#endif
};
