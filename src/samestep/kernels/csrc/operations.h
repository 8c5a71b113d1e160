/* The operations of a program: what each does, and what its numbers mean. A part of
 * samestep.h, which is what to include. */
typedef enum {
    /* Inputs of the call's samples. i: by_feature, by_sample, features, channels,
     * scale, offset (both buffers [channels]).
     * x = byte * scale[channel] - offset[channel], rounded twice. -1 as by_feature or
     * by_sample: not needed. */
    OP_GATHER_BYTES,
    /* Some columns of `call->inputs`, or of the targets, float32 [samples, columns].
     * i: by_feature, by_sample, features, first column, columns (0: features), whether
     * they are of `call->targets`. */
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
     * 0. flags: OP_CAUSAL, a query sees no later keys; OP_MASKED, to the scaled scores a
     * view is added: a buffer by feature, its rows, the first one, rows from one head,
     * query and key to the next; or -1, 0 and the same of parameters, in elements. */
    OP_ATTENTION,
    /* The gradients of q, k and v. i: 0 to 16 as OP_ATTENTION, a view of dy (17 to 21),
     * the buffers of dq, dk and dv, in which they lie as q, k and v in theirs, and the
     * others from 25 on again. */
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
    /* Some columns of `call->tokens`, or of the labels, int64 [samples, columns], as
     * int32; what is no int32 becomes -1. i: tokens (by feature), -1, positions, first
     * column, columns (0: positions), whether they are of `call->labels`. Or, instead of
     * -1, the offset of constants, [positions], which every sample has. */
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
     * i: x, y, rows, count, whether what has no finite term is 0, whether y is its
     * logarithm, (x - max x) - log(chain(exp(x - max x))). */
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
    /* What a loss of the user's own measures: of each sample, `cells` numbers, the loss
     * first, into `call->losses`, and their sums into `call->loss_sums`. i: x (by
     * feature, rows [cells]), the gradient of the loss (by feature, one row) or -1,
     * cells. */
    OP_MEASURE,
    /* y[p] = x[p, label[p]]; what is no label gives NaN. i: x, y, labels (int32; all by
     * feature, rows [positions, classes], [positions], [positions]), positions,
     * classes. */
    OP_PICK,
    /* dx[p, c] = c == label[p] ? dy[p] : +0. i: dy, dx, labels, positions, classes. */
    OP_PICK_GRAD,
    /* y = u + f[0] for every element, with a u in [0, 1) from counters, of 24 bits.
     * i: y (by feature), features, stream. */
    OP_DRAW,
    /* Every row of y is the sum of rows of x that are given, each times a weight: what
     * only moves, repeats and mixes rows, and its gradient. +0, s = fma(weight, x, s) in
     * order, or s = s + x without weights, in blocks of 256 terms; one term without
     * weights is copied.
     * i: x, y (both by feature), rows of x, of y, then places among the constants: of
     * ends (int32 [rows of y + 1], of the terms of the rows before), of the rows of x
     * (int32 [terms]), of weights [terms] or -1. */
    OP_COMBINE,
    NUM_OPS
} OpKind;

#define AXES 6 /* of rows that pointwise operations go through */
/* Functions of OP_UNARY: x, f[0], -x, |x|, 1 / x, the root, those of functions.h and
 * gelu.h; GELU whose derivative takes the place of x; int32 as floats, and floats as
 * int32, cut off (what is none becomes -1). */
enum {
    UNARY_COPY, UNARY_FILL, UNARY_NEG, UNARY_ABS, UNARY_RECIPROCAL, UNARY_SQRT,
    UNARY_RSQRT, UNARY_EXP, UNARY_LOG, UNARY_TANH, UNARY_SIGMOID, UNARY_ERF, UNARY_SIN,
    UNARY_COS, UNARY_GELU, UNARY_GELU_TANH, UNARY_SILU, UNARY_EXPM1, UNARY_LOG1P,
    UNARY_GELU_SLOPE, UNARY_FROM_INT, UNARY_TO_INT,
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
    OP_MASKED = 256,
    OP_REVERSED = 16,
    OP_LAST_STATE = 32
};
