/* BatchNorm. The first pass, feature by feature, takes the statistics of every
 * micro-batch and normalises; the second, panel by panel, is elementwise. */

#include "reductions.h"

/* One feature of a matrix by feature. */
typedef struct {
    float *row;   /* in the first panel */
    int64_t step; /* to the next panel */
} Feature;

INLINE Feature feature_of(const Call *call, int64_t buffer, int64_t features,
                          int64_t f) {
    return (Feature){call->buffers[buffer] + f * PANEL, features * PANEL};
}
INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

/* mean and variance of the columns [start, end). */
INLINE float mean_of(Feature x, int64_t start, int64_t end) {
    Lanes sum = {0};
    for (int64_t c = start; c < end; c += LANES)
        sum = add_lanes(
            sum, load_columns(x.row, x.step, c, at_most(end - c, LANES)));
    return sum_of(sum) / (float)(end - start);
}
INLINE float variance_of(Feature x, float mean, int64_t start, int64_t end) {
    Lanes sum = {0};
    for (int64_t c = start; c < end; c += LANES) {
        int64_t n = at_most(end - c, LANES);
        Lanes d = load_columns(x.row, x.step, c, n);
        for (int j = 0; j < LANES / VW; j++) {
            d.part[j] -= mean;
            d.part[j] *= d.part[j];
        }
        sum = add_lanes(sum, n < LANES ? first_of(d, n) : d);
    }
    return sum_of(sum) / (float)(end - start);
}
INLINE void normalise(Feature x, Feature z, float mean, float inverse, int64_t start,
                      int64_t end) {
    for (int64_t c = start; c < end; c += LANES) {
        int64_t n = at_most(end - c, LANES);
        Lanes d = load_columns(x.row, x.step, c, n);
        for (int j = 0; j < LANES / VW; j++) d.part[j] = (d.part[j] - mean) * inverse;
        store_columns(z.row, z.step, c, n, d);
    }
}
INLINE float inverse_of(float variance, float eps) {
    return (1 / sqrt_(splat(variance + eps)))[0];
}

/* The first pass over one feature, and its running statistics after the step. */
static void take_statistics(const Op *op, const Call *call, int64_t f) {
    int64_t features = op->i[4];
    Feature x = feature_of(call, op->i[0], features, f);
    Feature z = feature_of(call, op->i[2], features, f);
    float *inverses = call->buffers[op->i[3]], momentum = op->f[1];
    float old_mean = call->running[op->i[7] + f];
    float old_variance = call->running[op->i[8] + f];
    TreeSums means = {.call = call, .place = call->tail + op->i[9] + f};
    TreeSums variances = {.call = call, .place = call->tail + op->i[10] + f};
    for (int64_t m = 0; m < call->micro_batches; m++) {
        int64_t start = call->starts[m], end = call->starts[m + 1], b = end - start;
        float new_mean = old_mean, new_variance = old_variance;
        if (b > 0) {
            float mean = mean_of(x, start, end);
            float variance = variance_of(x, mean, start, end);
            float inverse = inverse_of(variance, op->f[0]);
            normalise(x, z, mean, inverse, start, end);
            inverses[m * features + f] = inverse;
            float unbiased = b > 1 ? variance * (float)((double)b / (double)(b - 1)) : 0;
            vf moved = fma_(splat(momentum), splat(mean - old_mean), splat(old_mean));
            new_mean = moved[0];
            moved = fma_(splat(momentum), splat(unbiased - old_variance),
                         splat(old_variance));
            new_variance = moved[0];
        }
        push_sum(&means, m, new_mean);
        push_sum(&variances, m, new_variance);
    }
}

/* The second pass over one panel: y = activate(fma(z, weight, bias)). */
static void scale_and_shift(const Op *op, const Call *call, int64_t first,
                            const Draws *draws) {
    int64_t features = op->i[4];
    float *source = call->buffers[op->i[op->flags & OP_EVAL ? 0 : 2]];
    for (int64_t f = 0; f < features; f++) {
        const float *from = row_of(source, first, features, f);
        float *to = row_of(call->buffers[op->i[1]], first, features, f);
        vf weight = splat(call->parameters[op->i[5] + f]);
        vf bias = splat(call->parameters[op->i[6] + f]);
        float mean = 0, inverse = 1;
        if (op->flags & OP_EVAL) {
            mean = call->running[op->i[7] + f];
            inverse = inverse_of(call->running[op->i[8] + f], op->f[0]);
        }
        for (int64_t c = 0; c < PANEL; c += VW) {
            vf z = load(from + c);
            if (op->flags & OP_EVAL) z = (z - mean) * inverse;
            store(to + c, activate(fma_(z, weight, bias), op->flags, draws, c, f));
        }
    }
}

static void op_batch_norm(const Op *op, const Call *call) {
    if (!(op->flags & OP_EVAL))
        for (int64_t f = 0; f < op->i[4]; f++) take_statistics(op, call, f);
    Draws draws;
    for (int64_t first = 0; first < num_samples(call); first += PANEL) {
        if (op->flags & OP_DROPOUT)
            prepare_draws(&draws, call, first, op->i[4], op->i[11], op->f[2]);
        scale_and_shift(op, call, first, &draws);
    }
}

/* The gradient behind the gate, in columns [c, c + n). */
INLINE Lanes gated_columns(Feature dy, Feature y, float factor, int64_t c, int64_t n) {
    Lanes g = load_columns(dy.row, dy.step, c, n);
    if (!y.row) return g;
    Lanes gate = load_columns(y.row, y.step, c, n);
    for (int j = 0; j < LANES / VW; j++)
        g.part[j] = gated(g.part[j], gate.part[j], factor);
    return g;
}

/* One feature: the gradients of its weight and bias, then of its inputs. */
static void grad_feature(const Op *op, const Call *call, int64_t f) {
    int64_t features = op->i[5];
    Feature dy = feature_of(call, op->i[0], features, f);
    Feature dx = feature_of(call, op->i[1], features, f), y = {NULL, 0};
    Feature z = feature_of(call, op->i[3], features, f);
    if (op->i[2] >= 0) y = feature_of(call, op->i[2], features, f);
    const float *inverses = call->buffers[op->i[4]];
    float weight = call->parameters[op->i[6] + f], factor = op->f[0];
    TreeSums weights = {.call = call, .place = op->i[7] + f};
    TreeSums biases = {.call = call, .place = op->i[8] + f};
    for (int64_t m = 0; m < call->micro_batches; m++) {
        int64_t start = call->starts[m], end = call->starts[m + 1];
        Lanes sum = {0}, products = {0};
        for (int64_t c = start; c < end; c += LANES) {
            int64_t n = at_most(end - c, LANES);
            Lanes g = gated_columns(dy, y, factor, c, n);
            Lanes normalised = load_columns(z.row, z.step, c, n);
            sum = add_lanes(sum, g);
            for (int j = 0; j < LANES / VW; j++)
                products.part[j] += g.part[j] * normalised.part[j];
        }
        float dbias = sum_of(sum), dweight = sum_of(products);
        if (op->i[8] >= 0) push_sum(&biases, m, dbias);
        if (op->i[7] >= 0) push_sum(&weights, m, dweight);
        if (end == start) continue;
        float b = (float)(end - start), scale = weight * inverses[m * features + f];
        float mean = dbias / b, slope = dweight / b;
        for (int64_t c = start; c < end; c += LANES) {
            int64_t n = at_most(end - c, LANES);
            Lanes g = gated_columns(dy, y, factor, c, n);
            Lanes normalised = load_columns(z.row, z.step, c, n);
            for (int j = 0; j < LANES / VW; j++)
                g.part[j] = scale * ((g.part[j] - mean) - normalised.part[j] * slope);
            store_columns(dx.row, dx.step, c, n, g);
        }
    }
}

static void op_batch_norm_grad(const Op *op, const Call *call) {
    for (int64_t f = 0; f < op->i[5]; f++) grad_feature(op, call, f);
}
