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
static int is_matrix(const Training *t, int64_t start, int64_t in, int64_t out) {
    return is_size(in) && is_size(out) && in_parameters(t, start, in * out);
}
static int is_probability(float p) { return p >= 0 && p < 1; }

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
           in_parameters(t, i[5], features) && in_parameters(t, i[6], features) &&
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
           in_parameters(t, i[6], features) && in_parameters(t, i[7], features) &&
           in_parameters(t, i[8], features);
}

static int is_valid(const Training *t, const Op *op) {
    const int64_t *i = op->i, values = t->header.values;
    switch (op->kind) {
    case OP_GATHER_BYTES:
    case OP_LOAD:
        return (i[0] == -1 || by_feature(t, i[0], i[2])) &&
               (i[1] == -1 || by_sample(t, i[1], i[2])) &&
               (op->kind == OP_LOAD
                    ? t->header.element == 4 && i[2] == t->header.features
                    : is_gather(t, i));
    case OP_TRANSPOSE:
        return by_feature(t, i[0], i[2]) && by_sample(t, i[1], i[2]);
    case OP_LINEAR:
        return by_feature(t, i[0], i[2]) && by_feature(t, i[1], i[3]) &&
               is_matrix(t, i[4], i[2], i[3]) &&
               (i[5] == -1 || in_parameters(t, i[5], i[3])) && is_probability(op->f[0]);
    case OP_LINEAR_GRAD_INPUT:
        return by_feature(t, i[0], i[3]) && by_feature(t, i[1], i[2]) &&
               is_matrix(t, i[4], i[2], i[3]) &&
               (i[5] == -1 || by_feature(t, i[5], i[2]));
    case OP_LINEAR_GRAD_WEIGHT:
        return by_feature(t, i[0], i[3]) && by_sample(t, i[1], i[2]) &&
               is_matrix(t, i[4], i[2], i[3]);
    case OP_GRAD_BIAS:
        return by_feature(t, i[0], i[1]) && in_parameters(t, i[2], i[1]);
    case OP_BATCH_NORM:
        return is_batch_norm(t, op);
    case OP_BATCH_NORM_GRAD:
        return is_batch_norm_grad(t, i);
    case OP_CROSS_ENTROPY:
        return values == 0 && by_feature(t, i[0], i[2]) &&
               (i[1] == -1 || by_feature(t, i[1], i[2]));
    case OP_SQUARED_ERROR:
        return values > 0 && values == i[2] && by_feature(t, i[0], i[2]) &&
               (i[1] == -1 || by_feature(t, i[1], i[2]));
    case OP_ACTIVATE:
        return by_feature(t, i[0], i[2]) && by_feature(t, i[1], i[2]) &&
               is_probability(op->f[0]);
    case OP_GATE:
        return by_feature(t, i[0], i[3]) && by_feature(t, i[1], i[3]) &&
               by_feature(t, i[2], i[3]);
    default: /* a training stores no outputs */
        return 0;
    }
}

void check_ops(const Training *t) {
    for (int64_t n = 0; n < t->header.ops; n++)
        require(is_valid(t, &t->ops[n]), "an operation leaves its buffers");
}
