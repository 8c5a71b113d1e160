/* The interface of the kernels: programs, what one call of a program needs, and the
 * few kernels that are called by themselves. docs/arithmetic.md defines every result.
 *
 * Panels. A matrix of activations [rows, columns] is stored as panels of 32 columns:
 * element (r, c) is at (c / 32) * rows_allocated * 32 + r * 32 + c % 32. Two matrices
 * are stored that way: "by feature", [features, samples], whose rows_allocated is the
 * number of features, and "by sample", [samples, features], whose rows_allocated is
 * `capacity`. Columns beyond the last are padding: kernels may compute them, nothing
 * reads them. No pointer needs any alignment beyond that of its type. */
#ifndef SAMESTEP_H
#define SAMESTEP_H

#include <stdint.h>

#define SAMESTEP_SPECIFICATION 1 /* of the arithmetic: docs/arithmetic.md */
#define SAMESTEP_INTERFACE 2     /* of this header */
#define PANEL 32                 /* columns of a panel */
/* Parts of the specification. */
#define K_BLOCK 256     /* terms of a block of a sum */
#define LANES 16        /* of a block of a reduction */
#define NORM_BLOCK 1024 /* elements of a block of a squared norm */

typedef enum {
    /* Inputs of the call's samples. i: by_feature, by_sample, features, channels,
     * scale, offset (both buffers [channels]).
     * x = byte * scale[channel] - offset[channel], rounded twice. -1 as by_feature or
     * by_sample: not needed. */
    OP_GATHER_BYTES,
    /* Inputs from `call->inputs`, float32 [samples, features].
     * i: by_feature, by_sample, features. */
    OP_LOAD,
    /* i: source (by feature), destination (by sample), features, positions, then the
     * source's rows, first row and step. Position p has rows [first + p step, ... +
     * features); its samples are rows [p capacity, (p + 1) capacity) of the
     * destination. */
    OP_TRANSPOSE,
    /* y = x W^T + b, then the epilogue. i: x, y (both by feature), in, out,
     * offset of W [out, in], offset of b or -1, dropout's stream, positions, then rows,
     * first row and step of x, then those of y. Each position is a product of its own,
     * as in OP_TRANSPOSE. For dropout, y must have nothing else in its buffer.
     * f: dropout's probability. flags: OP_RELU, OP_DROPOUT. */
    OP_LINEAR,
    /* dx = dy W, then the gate. i: dy, dx (both by feature), in, out, offset of W,
     * gate (by feature, laid out as dx) or -1, positions, then rows, first row and step
     * of dy, then those of dx. f: factor. With a gate,
     * dx = gate <= 0 ? 0 : dx * factor, or dx * gate (OP_SLOPE). */
    OP_LINEAR_GRAD_INPUT,
    /* dW = dy^T x of every micro-batch, summed up the tree into the slots. Terms are
     * ordered by position, then by sample.
     * i: dy (by feature), x (by sample), in, out, offset of W in a slot, positions, then
     * rows, first row and step of dy, then positions, first position and step of x. */
    OP_LINEAR_GRAD_WEIGHT,
    /* The sum of dy over the samples of every micro-batch, up the tree into the slots.
     * i: dy (by feature), features, offset in a slot, rows and first row of dy. */
    OP_GRAD_BIAS,
    /* y = dropout(relu(batch_norm(x))) with the statistics of every micro-batch, or
     * with the running ones (flag OP_EVAL). i: x, y, normalised (all by feature),
     * inverse deviations [micro-batches, features], features, offsets of weight and
     * bias, places of mean and variance among the running statistics, and in a slot's
     * tail, dropout's stream. A micro-batch without samples gives the tail the running
     * statistics as they were.
     * f: eps, momentum, dropout's probability. flags as OP_LINEAR, OP_EVAL. */
    OP_BATCH_NORM,
    /* i: dy, dx (both by feature), y (the gate, by feature, or -1), normalised, inverse
     * deviations, features, offset of the weight, offsets of weight and bias in a slot
     * or -1.
     * f: factor of the gate. */
    OP_BATCH_NORM_GRAD,
    /* Cross-entropy with label smoothing, and right answers. i: logits, gradient or -1
     * (both by feature, rows [positions, classes]), classes, ignored label, positions
     * (0 is 1), each of which has a label. f: smoothing. */
    OP_CROSS_ENTROPY,
    /* Half the squared error, and absolute errors. i: outputs, gradient or -1 (both by
     * feature), values. */
    OP_SQUARED_ERROR,
    /* y = x > 0 ? x : 0, then dropout. i: x, y (both by feature), features, dropout's
     * stream. f: dropout's probability. flags as OP_LINEAR. */
    OP_ACTIVATE,
    /* dx = gate <= 0 ? 0 : dy * factor. i: dy, dx, gate (all by feature), features.
     * f: factor. */
    OP_GATE,
    /* Outputs for the caller, float32 [samples, features] in `call->outputs`.
     * i: x (by feature), features. */
    OP_STORE,
    /* Pooling of images [planes, height, width]. A kernel of 0 is adaptive: windows
     * share the axis. i: x, y (both by feature), pixels with the largest values (int32,
     * by feature) or -1, planes; of the height: size, size of the result, kernel,
     * stride, padding, dilation; the same of the width. flags: OP_RELU, which cuts off
     * y and leaves -1 in the pixels where it did. */
    OP_MAX_POOL,
    /* i: dy, dx, pixels, and the others as OP_MAX_POOL. */
    OP_MAX_POOL_GRAD,
    /* Means of windows. i: x, y, -1, and as OP_MAX_POOL, then what a sum is divided by:
     * 0 its pixels, -1 those in the padding, too, or a number. */
    OP_MEAN_POOL,
    /* i: dy, dx, and the others as OP_MEAN_POOL. */
    OP_MEAN_POOL_GRAD,
    /* y = relu(batch_norm(x) + added) of images, rows [channels, pixels], with the
     * statistics of every micro-batch, or with the running ones (OP_EVAL, without means
     * and inverse deviations). i: x, y, means, inverse deviations (both by feature,
     * [channels]), channels, pixels, offsets of weight and bias, places of mean and
     * variance among the running statistics and in a slot's tail, added (by feature);
     * from the offsets on, each may be -1.
     * f: eps, momentum. flags: OP_RELU, OP_EVAL. */
    OP_BATCH_NORM_2D,
    /* i: dy, dx, y (the gate, or -1), x, means, inverse deviations, room (by feature,
     * [2 channels]), channels, pixels, offsets of weight and bias, the same in a slot;
     * the last four may be -1. flags: OP_RELU, with which the gate is computed anew if
     * there is none. */
    OP_BATCH_NORM_2D_GRAD,
    /* Attention of every head: softmax(scale q k^T) v, and what its gradient needs.
     * i: views of q, k and v, 5 numbers each (buffer, its rows, the row of the first
     * vector, rows from one head to the next, from one position to the next; features
     * lie side by side), y [queries, heads, width], kept [2, heads, queries], both by
     * feature; 17 to 24 unused; workspace, heads, queries, keys, width. f: scale, above
     * 0. flags: OP_CAUSAL, a query sees no later keys. */
    OP_ATTENTION,
    /* The gradients of q, k and v. i: 0 to 16 as OP_ATTENTION, a view of dy (17 to 21),
     * the buffers of dq, dk and dv, in which they lie as q, k and v in theirs, and the
     * last five again. */
    OP_ATTENTION_GRAD,
    /* Convolutions. Their numbers i[2] to i[14] are: in and out channels, groups, then,
     * each for height and width, the inputs' pixels, kernel, stride, padding, dilation.
     * W is [out, in / groups, kernel...].
     * y = x convolved with W, + b, then the epilogue. i: x, y (both by feature), ...,
     * offset of W, of b or -1, dropout's stream. f, flags: as OP_LINEAR. */
    OP_CONV,
    /* dx, + b, then the gate. i: dy, dx (both by feature), ..., offset of W, gate or -1,
     * offset of b [in] or -1, for transposed convolutions. f: as OP_LINEAR_GRAD_INPUT. */
    OP_CONV_GRAD_INPUT,
    /* dW and db of every micro-batch, up the tree into the slots. i: dy, x (both by
     * feature), ..., offsets of W and of b in a slot, -1 without, a buffer for
     * [CONV_SUMS, samples] sums by feature. Then -1, or, where the results were pooled by
     * windows that follow each other and dy is of the pooled: pixels as in OP_MAX_POOL,
     * height and width of a window, rows and columns of windows. */
    OP_CONV_GRAD_WEIGHT,
    /* y = (sum of x over `count` axes of rows) / divisor: +0, s = s + x in order, in
     * blocks of 256 terms. i: x, y (both by feature), rows and first row of x, then the
     * sizes of two axes of y, rows in row-major order, and of two axes of terms; then
     * the four axes' strides in x. f: divisor. */
    OP_SUM_ROWS,
    /* y = f(x) row by row. i: x, y (both by feature), function, rows and first row of x,
     * those of y, sizes of AXES axes of rows, their strides in x, in y. f: two numbers
     * that some functions take. */
    OP_UNARY,
    /* y = f(a, b), likewise; y has nothing else in its buffer. i: a, y, b (all by
     * feature), function, rows and first row of a, of b, sizes of AXES axes, their
     * strides in a, in b. A `b` of -1 are parameters: first row and strides are in
     * elements; -2 is the number f[0]. */
    OP_BINARY,
    /* Tokens from `call->tokens`, int64 [samples, positions], as int32; what is no int32
     * from 0 on becomes -1. i: tokens (by feature), -1, positions. */
    OP_LOAD_TOKENS,
    /* Rows of a table. i: tokens, y (both by feature, rows of y [positions, width]),
     * width, offset of the table [vocabulary, width], then the rows of the tokens'
     * buffer, the first row, rows from one position to the next, positions, vocabulary.
     * A token that is no row gives NaN. */
    OP_EMBEDDING,
    /* The gradient of the table, of every micro-batch, up the tree into the slots. Terms
     * of a row are ordered by position, then by sample.
     * i: dy (by sample, at the positions), tokens, width, offset in a slot, as
     * OP_EMBEDDING from 4 to 8, room for vocabulary + 1 numbers, room (by feature,
     * positions), a token that is padding or -1. */
    OP_EMBEDDING_GRAD,
    /* Every position's features with mean 0 and variance 1, then times the weight, plus
     * the bias. i: x, y, means, inverse deviations (all by feature; the last two
     * [positions]), features, positions, then rows, first row and step of x, those of y,
     * offsets of weight and bias, each or -1 (a bias needs a weight). f: eps. */
    OP_LAYER_NORM,
    /* i: dy, dx, x, means, inverse deviations, sums over positions (by feature,
     * [2, features]: of dy times what is normalised, and of dy) or -1, features,
     * positions, then rows, first row and step of dy, of dx, of x, offset of the weight
     * or -1. */
    OP_LAYER_NORM_GRAD,
    /* All steps of a recurrent layer's direction, of `gates` * hidden rows each: an
     * LSTM has 4 gates, a GRU 3, a plain one 1 (with tanh; flag OP_RELU: with ReLU).
     * Steps go from the first to the last, with the flag OP_REVERSED back.
     * i: gates [steps, gates, hidden], which holds the products with the inputs and
     * becomes the gates' values (of a plain one nothing); states [steps + 1, hidden],
     * whose first (reversed: last) is that before the first step; what else the
     * gradient needs (LSTM: cells as states, then their tanh [steps, hidden]; GRU:
     * products with the state [steps, gates, hidden]; otherwise -1); room for
     * ROOM(gates * hidden, hidden) + gates * hidden * PANEL floats; steps, hidden,
     * offset of W [gates * hidden, hidden], offset of its bias or -1; the state and
     * the LSTM's cell before the first step [hidden], or -1: zero. All by feature. */
    OP_LSTM,
    OP_GRU,
    OP_RNN,
    /* Its gradient. i: dy [steps, hidden] or -1; gates, which become the gradients of
     * the products with the inputs; states; what else was kept (GRU: becomes the
     * gradients of the products with the state); room for ROOM(hidden, gates * hidden)
     * + 2 * hidden * PANEL floats; steps, hidden, offset of W; the only step that has
     * a dy, which is [hidden] then, or -1: all; gradients of the state and of the
     * LSTM's cell [hidden] or -1: those before the first step, and with the flag
     * OP_LAST_STATE, on entry, those after the last. */
    OP_LSTM_GRAD,
    OP_GRU_GRAD,
    OP_RNN_GRAD,
    /* Products of matrices within each sample: y[g, m, n] = product(a[g, m, :],
     * b[g, :, n]), rows of y in this order.
     * i: a, y, b, rows and first row of a, of b, sizes g, m, n, k, strides in a of g, m,
     *    k, strides in b of g, k, n. */
    OP_MATMUL,
    /* y = exp(x - max x) / chain(exp(x - max x)) over each `count` rows in turn.
     * i: x, y, rows, count, whether what has no finite term is 0. */
    OP_SOFTMAX,
    /* The gradient of a parameter that is used several times: those of each micro-batch
     * are added in order, then up the tree into the slots. i: buffer [uses,
     * micro-batches, size], uses, size, offset in a slot. */
    OP_ADD_LEAVES,
    /* OP_CONV and OP_MAX_POOL as one, with windows that follow each other; a product
     * has at most K_BLOCK terms. i: 0 to 16 as OP_CONV, but y is the pooled result;
     * 17 unused; pixels as in OP_MAX_POOL, or -1; room for one panel [out, height of a
     * window, width of the convolution's result]; height and width of a window. flags:
     * OP_RELU, as in OP_MAX_POOL. */
    OP_CONV_MAX_POOL,
    NUM_OPS
} OpKind;

#define AXES 6 /* of rows that pointwise operations go through */
/* Functions of OP_UNARY: x, f[0], -x, |x|, 1 / x, the root, those of functions.h and
 * gelu.h; at last GELU whose derivative takes the place of x. */
enum {
    UNARY_COPY, UNARY_FILL, UNARY_NEG, UNARY_ABS, UNARY_RECIPROCAL, UNARY_SQRT,
    UNARY_RSQRT, UNARY_EXP, UNARY_LOG, UNARY_TANH, UNARY_SIGMOID, UNARY_ERF, UNARY_SIN,
    UNARY_COS, UNARY_GELU, UNARY_GELU_TANH, UNARY_SILU, UNARY_EXPM1, UNARY_LOG1P,
    UNARY_GELU_SLOPE,
    NUM_UNARY
};
/* Functions of OP_BINARY: a + b, a - b, a * b, a / b; gradients, of dy and y = tanh(x)
 * or sigmoid(x), or of dy and x. */
enum {
    BINARY_ADD, BINARY_SUB, BINARY_MUL, BINARY_DIV, BINARY_TANH_GRAD,
    BINARY_SIGMOID_GRAD, BINARY_GELU_GRAD, BINARY_GELU_TANH_GRAD, BINARY_SILU_GRAD,
    /* The larger, the smaller, a NaN of either; 1 or 0 for a > b, a >= b, a < b, a <= b,
     * a == b; a or 0 where b is not 0, where it is. */
    BINARY_MAX, BINARY_MIN, BINARY_GREATER, BINARY_AT_LEAST, BINARY_LESS,
    BINARY_AT_MOST, BINARY_EQUAL, BINARY_WHERE, BINARY_WHERE_NOT,
    NUM_BINARY
};

#define CONV_SUMS 512 /* of every sample that a convolution's gradient keeps */

/* Floats for the packed weights of a recurrent layer, a multiple of 16: no tile has
 * more than 16 rows, and whole vectors are stored. */
#define ROOM(rows, terms) ((((rows) + 16) * (terms) + 31) / 16 * 16)

enum {
    OP_RELU = 1,
    OP_DROPOUT = 2,
    OP_EVAL = 4,
    OP_CAUSAL = 8,
    /* The gradient of a parameter stays apart for every micro-batch, as use i[27] in
     * buffer i[29] of OP_ADD_LEAVES, each of i[28] elements; its offset is 0. */
    OP_LEAVES = 64,
    OP_SLOPE = 128, /* the gate is a factor */
    OP_REVERSED = 16,
    OP_LAST_STATE = 32
};

/* One operation. `i` holds numbers of buffers, sizes and offsets (in elements), in the
 * order of the comments above; unused ones are 0. 264 bytes, little-endian in files. */
typedef struct {
    int32_t kind;
    int32_t flags;
    int64_t i[30];
    float f[4];
} Op;

/* What one call needs besides the program. Micro-batch m has the columns
 * [starts[m], starts[m + 1]); starts[0] is 0. */
typedef struct {
    float *const *buffers;     /* activations and constants, by number */
    const float *parameters;   /* the vector of all parameters */
    const float *running;      /* BatchNorm's running statistics before the step */
    int64_t capacity;          /* samples that buffers have room for: whole panels */
    int64_t micro_batches;     /* of this worker, at least 1 */
    const int64_t *starts;     /* [micro_batches + 1] */
    const int64_t *merges;     /* [micro_batches]: sums that each completes */
    const uint64_t *keys;      /* [micro_batches]: of dropout */
    float weight;              /* of a sample's loss in the gradient */
    int32_t slots_size;        /* how many slots there are */
    float *const *slots;       /* [slots_size] of [parameters | tail]: a sum each */
    int64_t tail;              /* where a slot's tail begins */
    const uint8_t *bytes;      /* [*, features], for OP_GATHER_BYTES */
    const int64_t *indices;    /* [samples]: rows of `bytes` */
    const float *inputs;       /* [samples, features], for OP_LOAD */
    const int64_t *labels;     /* [samples, positions], or NULL */
    const float *targets;      /* [samples, values], or NULL */
    float *losses;             /* [samples, positions] */
    float *metrics;            /* the same: 1 for a right answer, or absolute errors */
    double *loss_sums;         /* [micro_batches]: of the losses, in double */
    double *metric_sums;       /* [micro_batches] */
    int64_t *answers;          /* the same: classes with the largest logit, or NULL */
    float *outputs;            /* [samples, features], for OP_STORE */
    const int64_t *partners;   /* [samples]: labels that are mixed in, or NULL */
    const float *shares;       /* [samples]: of `labels`, the rest is the partners' */
    const int64_t *tokens;     /* [samples, positions], for OP_LOAD_TOKENS */
    const float *constants;    /* what training does not change, from CONSTANTS on */
} Call;

/* The first place of a constant. Smaller ones are places in the parameters. */
#define CONSTANTS ((int64_t)1 << 40)

static inline const float *weights_at(const Call *call, int64_t place) {
    return place < CONSTANTS ? call->parameters + place
                             : call->constants + (place - CONSTANTS);
}

/* Elementwise update of parameters [size] by the sum of partial gradients. */
typedef enum { SGD, ADAM, ADAMW } OptimizerKind;

typedef struct {
    int32_t kind;
    int32_t nesterov;
    int32_t is_first;    /* SGD: the momentum begins with the gradient */
    float lr;            /* SGD: learning rate; Adam: lr / (1 - beta1^t) */
    float weight_decay;  /* ADAMW: the factor 1 - lr * weight_decay */
    float beta1;         /* SGD: momentum */
    float beta2;
    float one_minus_beta1, one_minus_beta2;
    float root;          /* 1 / sqrt(1 - beta2^t) */
    float eps;
} Optimizer;

/* Where the samples of a micro-batch lie: columns [first, end) of buffers that begin
 * `distance` floats after this worker's, in the memory of the worker that owns it. */
typedef struct {
    int64_t distance, first, end;
    int64_t merges; /* sums of the tree that it completes */
} MicroBatch;

/* What one worker updates: with `op` >= 0, the rows [first, end) of the matrix whose
 * gradient is that operation, an OP_LINEAR_GRAD_WEIGHT; else, with -1, the elements
 * [first, end) of the vectors. `group` is the number of its optimizer. */
typedef struct {
    int64_t op, first, end, group;
} UpdatePart;

/* An update that computes the gradients of matrices itself, of all micro-batches of the
 * step. Vectors are whole: they begin with the first parameter. */
typedef struct {
    const Op *ops;
    const Call *call; /* of this worker: its buffers and their capacity */
    const MicroBatch *micro_batches; /* in the order of the tree */
    int64_t num_micro_batches;
    const UpdatePart *parts;
    int64_t num_parts;
    const Optimizer *optimizers;
    const float *const *leaves; /* of the other gradients' sum, as for `update` */
    const int32_t *order;
    int64_t order_size;
    float *parameters, *state1, *state2;
} Update;

/* The kernels of one instruction set. */
typedef struct {
    const char *isa;
    /* Run a program. Returns 0, or 1 + the number of an operation that is unknown. */
    int64_t (*run)(const Op *ops, int64_t num_ops, const Call *call);
    /* out = sum of the leaves in `order`, a postfix program: n >= 0 pushes leaf n, -1
     * adds the two on top. `out` may be one of the leaves. */
    void (*tree_sum)(float *out, const float *const *leaves, const int32_t *order,
                     int64_t order_size, int64_t size);
    /* The same sum, and the update with it, in one pass. state1, state2: momentum, or
     * both averages of Adam. */
    void (*update)(const Optimizer *how, const float *const *leaves,
                   const int32_t *order, int64_t order_size, float *parameters,
                   float *state1, float *state2, int64_t size);
    void (*update_parts)(const Update *update);
    /* average = fma(weight, parameters - average, average) */
    void (*average)(float *average, const float *parameters, float weight,
                    int64_t size);
    /* squares[b] = the squared norm of block b of 1,024 elements, in float64. */
    void (*squared_norms)(const float *vector, double *squares, int64_t blocks);
    void (*scale)(float *vector, float factor, int64_t size);
    /* One function on an array, for tests and for own modules: "exp", "log", ... are
     * numbered as in functions.h. Returns -1 for an unknown number. */
    int (*function)(int32_t number, const float *x, float *y, int64_t size);
} Kernels;

/* Exported symbols; everything else is compiled with -fvisibility=hidden. */
#if defined(_WIN32)
#define SAMESTEP_EXPORT __declspec(dllexport)
#else
#define SAMESTEP_EXPORT __attribute__((visibility("default")))
#endif

SAMESTEP_EXPORT int32_t samestep_specification(void);
SAMESTEP_EXPORT int32_t samestep_interface(void);
/* The digest of the sources that the library was compiled from (compiling.py). */
SAMESTEP_EXPORT const char *samestep_sources(void);
/* Choose the kernels: an instruction set by name, or NULL for the best that this
 * processor has. NULL if it is unknown, not compiled in or not supported. */
SAMESTEP_EXPORT const Kernels *samestep_kernels(const char *isa);
/* The names of the instruction sets that are compiled in, the best first, NULL last. */
SAMESTEP_EXPORT const char *const *samestep_isas(void);

#endif
