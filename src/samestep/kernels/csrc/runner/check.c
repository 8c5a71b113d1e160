/* Whether operations stay within their buffers, the parameters and the slots. */
#include "runner.h"

static int is_size(int64_t n) { return n > 0 && n <= MOST; }

/* Whether a buffer has room for so many elements. */
static int has(const Training *t, int64_t buffer, int64_t size) {
    return buffer >= 0 && buffer < t->header.buffers && t->sizes[buffer] >= size;
}
static int by_feature(const Training *t, int64_t buffer, int64_t features) {
    return is_size(features) && has(t, buffer, t->header.capacity * features);
}
static int by_sample(const Training *t, int64_t buffer, int64_t features) {
    int64_t panels = (features + PANEL - 1) / PANEL;
    return is_size(features) && has(t, buffer, t->header.capacity * panels * PANEL);
}
static int in_range(int64_t start, int64_t size, int64_t whole) {
    return start >= 0 && start <= whole && size <= whole - start;
}
static int in_parameters(const Training *t, int64_t start, int64_t size) {
    return in_range(start, size, t->header.parameters);
}
static int in_running(const Training *t, int64_t start, int64_t size) {
    return in_range(start, size, t->header.running);
}
/* The same for what is only read: parameters, or what training does not change. */
static int in_weights(const Training *t, int64_t start, int64_t size) {
    return start < CONSTANTS ? in_parameters(t, start, size)
                             : in_range(start - CONSTANTS, size, t->header.fixed);
}
static int is_matrix(const Training *t, int64_t start, int64_t in, int64_t out) {
    return is_size(in) && is_size(out) && in_weights(t, start, in * out);
}
/* Whether rows [first, ...) along axes with sizes and strides, and `width` rows from
 * each, are among `rows`. */
static int in_rows(int64_t rows, int64_t first, const int64_t *sizes,
                   const int64_t *strides, int64_t axes, int64_t width) {
    int64_t last = 0;
    for (int64_t n = 0; n < axes; n++) {
        if (!is_size(sizes[n]) || strides[n] < 0 || strides[n] > MOST) return 0;
        last += (sizes[n] - 1) * strides[n];
    }
    return is_size(width) && first >= 0 && first <= MOST && first + last + width <= rows;
}
/* Whether axes are at most `most` rows. */
static int is_product(const int64_t *sizes, int64_t axes, int64_t most) {
    int64_t product = 1;
    for (int64_t n = 0; n < axes; n++) {
        if (!is_size(sizes[n]) || product * sizes[n] > most) return 0;
        product *= sizes[n];
    }
    return 1;
}
/* Positions of `width` features by feature; `place` are rows, first row and step. */
static int at_positions(const Training *t, int64_t buffer, int64_t positions,
                        const int64_t *place, int64_t width) {
    return by_feature(t, buffer, place[0]) &&
           in_rows(place[0], place[1], &positions, &place[2], 1, width);
}
/* The same by sample; `place` are positions, the first one and step. */
static int by_sample_at(const Training *t, int64_t buffer, int64_t positions,
                        const int64_t *place, int64_t features) {
    int64_t panels = (features + PANEL - 1) / PANEL;
    return is_size(features) && is_size(place[0]) &&
           panels * PANEL <= MOST / place[0] &&
           has(t, buffer, t->header.capacity * panels * PANEL * place[0]) &&
           in_rows(place[0], place[1], &positions, &place[2], 1, 1);
}
static int is_probability(float p) { return p >= 0 && p < 1; }

#include "check_images.h"

static int is_gather(const Training *t, const int64_t *i) {
    int64_t channels = i[3];
    return t->header.element == 1 && i[2] == t->header.features && is_size(channels) &&
           i[2] % channels == 0 && has(t, i[4], channels) && has(t, i[5], channels);
}

static int is_batch_norm(const Training *t, const Op *op) {
    const int64_t *i = op->i, features = i[4];
    for (int n = 0; n < 3; n++)
        if (!by_feature(t, i[n], features)) return 0;
    return has(t, i[3], t->header.micro_batches * features) &&
           in_weights(t, i[5], features) && in_weights(t, i[6], features) &&
           in_running(t, i[7], features) && in_running(t, i[8], features) &&
           in_running(t, i[9], features) && in_running(t, i[10], features) &&
           is_probability(op->f[2]);
}

static int is_batch_norm_grad(const Training *t, const int64_t *i) {
    int64_t features = i[5];
    return by_feature(t, i[0], features) && by_feature(t, i[1], features) &&
           (i[2] == -1 || by_feature(t, i[2], features)) &&
           by_feature(t, i[3], features) &&
           has(t, i[4], t->header.micro_batches * features) &&
           in_weights(t, i[6], features) && in_parameters(t, i[7], features) &&
           in_parameters(t, i[8], features);
}

/* a b, or a number that is no size. */
static int64_t times(int64_t a, int64_t b) {
    return is_size(a) && is_size(b) && a <= MOST / b ? a * b : 0;
}

/* A view of `positions` vectors for each head: five numbers of an attention. */
static int is_view(const Training *t, const int64_t *view, int64_t buffer,
                   int64_t heads, int64_t positions, int64_t width) {
    int64_t rows = view[1], last = width;
    for (int n = 2; n < 5; n++)
        if (view[n] < 0 || view[n] > MOST) return 0;
    if (!is_size(times(heads, positions)) || !is_size(width)) return 0;
    last += view[2] + (heads - 1) * view[3] + (positions - 1) * view[4];
    return last <= rows && by_feature(t, buffer, rows);
}

static int is_embedding(const Training *t, const int64_t *i, int64_t tokens) {
    int64_t width = i[2], positions = i[7], vocabulary = i[8];
    for (int n = 5; n < 7; n++)
        if (i[n] < 0 || i[n] > MOST) return 0;
    return is_matrix(t, i[3], width, vocabulary) && is_size(positions) &&
           i[5] + (positions - 1) * i[6] < i[4] && by_feature(t, tokens, i[4]);
}
static int is_embedding_grad(const Training *t, const int64_t *i) {
    int64_t size = times(i[7], t->header.capacity), panels = (i[2] + PANEL - 1) / PANEL;
    int64_t room = times(size, panels * PANEL);
    return i[9] != i[10] && i[9] != i[1] && i[10] != i[1] && room > 0 &&
           has(t, i[0], room) && has(t, i[9], i[8] + 1) && has(t, i[10], size) &&
           in_parameters(t, i[3], i[2] * i[8]);
}

/* What an attention adds to its scores. */
static int is_mask(const Training *t, const int64_t *i, const int64_t *sizes) {
    if (i[0] == -1) {
        int64_t last = 1;
        for (int n = 0; n < 3; n++) {
            if (i[n + 3] < 0 || i[n + 3] > MOST) return 0;
            last += (sizes[n] - 1) * i[n + 3];
        }
        return in_parameters(t, i[2], last);
    }
    return by_feature(t, i[0], i[1]) && in_rows(i[1], i[2], sizes, i + 3, 3, 1);
}

static int is_attention(const Training *t, const Op *op) {
    const int64_t *i = op->i;
    int64_t heads = i[26], queries = i[27], keys = i[28], width = i[29];
    int64_t room = times(heads, times(queries, width)), kept = times(heads, queries);
    if (!is_view(t, i, i[0], heads, queries, width) ||
        !is_view(t, i + 5, i[5], heads, keys, width) ||
        !is_view(t, i + 10, i[10], heads, keys, width) || !by_feature(t, i[15], room) ||
        !by_feature(t, i[16], 2 * kept))
        return 0;
    int64_t vectors = 6 * times(keys, width) + 16 * (4 * width + 3 + 2 * keys);
    if (!has(t, i[25], LANES * vectors)) return 0;
    if (op->flags & OP_MASKED && !is_mask(t, i + 30, i + 26)) return 0;
    return op->kind == OP_ATTENTION ||
           (is_view(t, i + 17, i[17], heads, queries, width) &&
            is_view(t, i, i[22], heads, queries, width) &&
            is_view(t, i + 5, i[23], heads, keys, width) &&
            is_view(t, i + 10, i[24], heads, keys, width));
}

static int is_sum_rows(const Training *t, const int64_t *i) {
    return by_feature(t, i[0], i[2]) && in_rows(i[2], i[3], i + 4, i + 8, 4, 1) &&
           is_product(i + 4, 2, MOST) && by_feature(t, i[1], i[4] * i[5]);
}

static int is_unary(const Training *t, const int64_t *i) {
    return i[2] >= 0 && i[2] < NUM_UNARY && by_feature(t, i[0], i[3]) &&
           by_feature(t, i[1], i[5]) &&
           in_rows(i[3], i[4], i + 7, i + 7 + AXES, AXES, 1) &&
           in_rows(i[5], i[6], i + 7, i + 7 + 2 * AXES, AXES, 1);
}

static int is_binary(const Training *t, const int64_t *i) {
    const int64_t *sizes = i + 8, *second = i + 8 + 2 * AXES;
    int64_t rows = i[2] == -2 ? 1 : i[6], first = i[7], size = 1;
    if (i[2] == -1 && first < CONSTANTS) rows = t->header.parameters;
    if (i[2] == -1 && first >= CONSTANTS) {
        rows = t->header.fixed;
        first -= CONSTANTS;
    }
    if (!is_product(sizes, AXES, MOST)) return 0;
    for (int64_t n = 0; n < AXES; n++) size *= sizes[n];
    return i[3] >= 0 && i[3] < NUM_BINARY && by_feature(t, i[0], i[4]) &&
           by_feature(t, i[1], size) && (i[2] < 0 || by_feature(t, i[2], i[6])) &&
           in_rows(i[4], i[5], sizes, i + 8 + AXES, AXES, 1) &&
           in_rows(rows, first, sizes, second, AXES, 1);
}

static int is_matmul(const Training *t, const int64_t *i) {
    const int64_t *z = i + 7, a[] = {z[0], z[1], z[3]}, b[] = {z[0], z[3], z[2]};
    return is_product(z, 4, MOST) && by_feature(t, i[0], i[3]) &&
           by_feature(t, i[2], i[5]) && by_feature(t, i[1], z[0] * z[1] * z[2]) &&
           in_rows(i[3], i[4], a, i + 11, 3, 1) && in_rows(i[5], i[6], b, i + 14, 3, 1);
}
static int is_softmax(const Training *t, const int64_t *i) {
    return by_feature(t, i[0], i[2]) && by_feature(t, i[1], i[2]) && i[3] > 0 &&
           i[2] % i[3] == 0;
}

static int is_layer_norm(const Training *t, const int64_t *i) {
    return at_positions(t, i[0], i[5], i + 6, i[4]) &&
           at_positions(t, i[1], i[5], i + 9, i[4]) && by_feature(t, i[2], i[5]) &&
           by_feature(t, i[3], i[5]) &&
           (i[12] == -1 || in_weights(t, i[12], i[4])) &&
           (i[13] == -1 || in_weights(t, i[13], i[4]));
}
static int is_layer_norm_grad(const Training *t, const int64_t *i) {
    for (int n = 0; n < 3; n++)
        if (!at_positions(t, i[n], i[7], i + 8 + 3 * n, i[6])) return 0;
    return by_feature(t, i[3], i[7]) && by_feature(t, i[4], i[7]) &&
           (i[5] == -1 || (i[6] <= MOST / 2 && by_feature(t, i[5], 2 * i[6]))) &&
           (i[17] == -1 || in_weights(t, i[17], i[6]));
}

/* Or there is none. */
static int is_optional(const Training *t, int64_t buffer, int64_t features) {
    return buffer == -1 || by_feature(t, buffer, features);
}

/* What both directions of a recurrent layer have: gates, states, what else is kept,
 * room, steps, hidden, the weights; `gates` is how many there are. */
static int is_recurrent(const Training *t, const int64_t *i, int64_t gates) {
    int64_t steps = i[4], n = i[5];
    if (!is_size(steps) || !is_size(n) || !is_size(steps * n)) return 0;
    int64_t kept = gates == 4 ? (2 * steps + 1) * n : gates * steps * n;
    return by_feature(t, i[0], steps * gates * n) &&
           by_feature(t, i[1], (steps + 1) * n) &&
           (gates == 1 || by_feature(t, i[2], kept)) &&
           is_matrix(t, i[6], n, gates * n);
}

static int is_steps(const Training *t, const int64_t *i, int64_t gates) {
    if (!is_recurrent(t, i, gates)) return 0;
    int64_t n = i[5], rows = gates * n;
    return has(t, i[3], ROOM(rows, n) + rows * PANEL) &&
           (i[7] == -1 || in_weights(t, i[7], rows)) && is_optional(t, i[8], n) &&
           is_optional(t, i[9], n);
}

static int is_steps_grad(const Training *t, const int64_t *i, int64_t gates) {
    if (!is_recurrent(t, i + 1, gates)) return 0;
    int64_t steps = i[5], n = i[6];
    return has(t, i[4], ROOM(n, gates * n) + 2 * n * PANEL) && i[8] >= -1 &&
           i[8] < steps && is_optional(t, i[0], (i[8] < 0 ? steps : 1) * n) &&
           is_optional(t, i[9], n) && is_optional(t, i[10], n);
}

/* Gradients that stay apart for every micro-batch: buffer [uses, micro-batches, size]. */
static int are_leaves(const Training *t, int64_t buffer, int64_t uses, int64_t size) {
    return is_size(uses) && is_size(size) && size <= MOST / uses &&
           has(t, buffer, t->header.micro_batches * uses * size);
}
static int has_leaves(const Training *t, const Op *op) {
    const int64_t *i = op->i;
    int64_t size = op->kind == OP_LINEAR_GRAD_WEIGHT ? i[2] * i[3]
                   : op->kind == OP_EMBEDDING_GRAD   ? i[2] * i[8]
                   : op->kind == OP_GRAD_BIAS        ? i[1]
                                                     : -1;
    int64_t place = op->kind == OP_LINEAR_GRAD_WEIGHT ? i[4]
                    : op->kind == OP_EMBEDDING_GRAD   ? i[3]
                                                      : i[2];
    return place == 0 && i[27] >= 0 && i[27] < MOST && size == i[28] &&
           are_leaves(t, i[29], i[27] + 1, size);
}

/* All columns of a sample. */
static int is_only_input(const Training *t, const int64_t *i) {
    return i[2] == t->header.features && i[3] == 0 && i[4] == 0 && i[5] == 0;
}

static int is_valid(const Training *t, const Op *op) {
    const int64_t *i = op->i, values = t->header.values;
    switch (op->kind) {
    case OP_GATHER_BYTES:
    case OP_LOAD:
        return (i[0] == -1 || by_feature(t, i[0], i[2])) &&
               (i[1] == -1 || by_sample(t, i[1], i[2])) &&
               (op->kind == OP_LOAD
                    ? t->header.element == 4 && is_only_input(t, i)
                    : is_gather(t, i));
    case OP_TRANSPOSE:
        return at_positions(t, i[0], i[3], i + 4, i[2]) &&
               by_sample_at(t, i[1], i[3], (int64_t[]){i[3], 0, 1}, i[2]);
    case OP_LINEAR:
        return at_positions(t, i[0], i[7], i + 8, i[2]) &&
               at_positions(t, i[1], i[7], i + 11, i[3]) &&
               is_matrix(t, i[4], i[2], i[3]) &&
               (i[5] == -1 || in_weights(t, i[5], i[3])) && is_probability(op->f[0]);
    case OP_LINEAR_GRAD_INPUT:
        return at_positions(t, i[0], i[6], i + 7, i[3]) &&
               at_positions(t, i[1], i[6], i + 10, i[2]) &&
               is_matrix(t, i[4], i[2], i[3]) &&
               (i[5] == -1 || at_positions(t, i[5], i[6], i + 10, i[2]));
    case OP_LINEAR_GRAD_WEIGHT:
        return at_positions(t, i[0], i[5], i + 6, i[3]) &&
               by_sample_at(t, i[1], i[5], i + 9, i[2]) &&
               is_matrix(t, i[4], i[2], i[3]) && i[4] < CONSTANTS;
    case OP_GRAD_BIAS:
        return by_feature(t, i[0], i[3]) && is_size(i[1]) && i[4] >= 0 &&
               i[4] <= i[3] - i[1] && in_parameters(t, i[2], i[1]);
    case OP_BATCH_NORM:
        return is_batch_norm(t, op);
    case OP_BATCH_NORM_GRAD:
        return is_batch_norm_grad(t, i);
    case OP_CROSS_ENTROPY: {
        int64_t rows = i[4] == 0 && t->header.positions == 1 ? i[2] : times(i[2], i[4]);
        return values == 0 && (i[4] == 0 || i[4] == t->header.positions) &&
               by_feature(t, i[0], rows) && (i[1] == -1 || by_feature(t, i[1], rows));
    }
    case OP_LOAD_TOKENS:
        return by_feature(t, i[0], i[2]) &&
               (i[1] == -1 ? t->header.element == 8 && is_only_input(t, i)
                           : in_weights(t, i[1], i[2]));
    case OP_EMBEDDING:
        return is_embedding(t, i, i[0]) && by_feature(t, i[1], times(i[7], i[2]));
    case OP_EMBEDDING_GRAD:
        return is_embedding(t, i, i[1]) && is_embedding_grad(t, i);
    case OP_SQUARED_ERROR:
        return values > 0 && values == i[2] && by_feature(t, i[0], i[2]) &&
               (i[1] == -1 || by_feature(t, i[1], i[2]));
    case OP_ACTIVATE:
        return by_feature(t, i[0], i[2]) && by_feature(t, i[1], i[2]) &&
               is_probability(op->f[0]);
    case OP_DRAW:
        return by_feature(t, i[0], i[1]);
    case OP_GATE:
        return by_feature(t, i[0], i[3]) && by_feature(t, i[1], i[3]) &&
               by_feature(t, i[2], i[3]);
    case OP_MAX_POOL:
    case OP_MAX_POOL_GRAD:
    case OP_MEAN_POOL:
    case OP_MEAN_POOL_GRAD:
        return is_pool(t, op);
    case OP_BATCH_NORM_2D:
        return is_batch_norm_2d(t, op);
    case OP_BATCH_NORM_2D_GRAD:
        return is_batch_norm_2d_grad(t, i);
    case OP_ATTENTION:
    case OP_ATTENTION_GRAD:
        return is_attention(t, op);
    case OP_CONV:
    case OP_CONV_GRAD_INPUT:
    case OP_CONV_GRAD_WEIGHT:
        return is_conv(t, op);
    case OP_CONV_MAX_POOL:
        return is_conv_max_pool(t, op);
    case OP_LAYER_NORM:
        return is_layer_norm(t, i);
    case OP_LAYER_NORM_GRAD:
        return is_layer_norm_grad(t, i);
    case OP_ADD_LEAVES:
        return are_leaves(t, i[0], i[1], i[2]) && in_parameters(t, i[3], i[2]);
    case OP_SUM_ROWS:
        return is_sum_rows(t, i);
    case OP_UNARY:
        return is_unary(t, i);
    case OP_BINARY:
        return is_binary(t, i);
    case OP_MATMUL:
        return is_matmul(t, i);
    case OP_SOFTMAX:
        return is_softmax(t, i);
    case OP_LSTM:
        return is_steps(t, i, 4);
    case OP_GRU:
        return is_steps(t, i, 3);
    case OP_RNN:
        return is_steps(t, i, 1);
    case OP_LSTM_GRAD:
        return is_steps_grad(t, i, 4);
    case OP_GRU_GRAD:
        return is_steps_grad(t, i, 3);
    case OP_RNN_GRAD:
        return is_steps_grad(t, i, 1);
    default: /* a training stores no outputs, and a file has no lists of rows */
        return 0;
    }
}

void check_ops(const Training *t) {
    for (int64_t n = 0; n < t->header.ops; n++)
        require(is_valid(t, &t->ops[n]) &&
                    (!(t->ops[n].flags & OP_LEAVES) || has_leaves(t, &t->ops[n])),
                "an operation leaves its buffers");
}
