/* BatchNorm. The first pass, feature by feature, takes the statistics of every
 * micro-batch and normalises; the second, panel by panel, is elementwise. */

/* One feature of a matrix by feature. */
typedef struct {
    float *row;   /* in the first panel */
    int64_t step; /* to the next panel */
} Feature;

INLINE Feature feature_of(const Call *call, int64_t buffer, int64_t features,
                          int64_t f) {
    return (Feature){call->buffers[buffer] + f * PANEL, features * PANEL};
}

/* The sum over a block, columns [start, end). */
INLINE float block_sum(Feature x, int64_t start, int64_t end) {
    Lanes sum = {0};
    for (int64_t c = start; c < end; c += LANES)
        sum = add_lanes(sum,
                        load_columns(x.row, x.step, c, smaller(LANES, end - c)));
    return sum_of(sum);
}
/* That of the squared distances from the mean. */
INLINE float block_squares(Feature x, float mean, int64_t start, int64_t end) {
    Lanes sum = {0};
    for (int64_t c = start; c < end; c += LANES) {
        int64_t n = smaller(LANES, end - c);
        Lanes d = load_columns(x.row, x.step, c, n);
        for (int j = 0; j < LANES / VW; j++) {
            d.part[j] -= mean;
            d.part[j] *= d.part[j];
        }
        sum = add_lanes(sum, n < LANES ? first_of(d, n) : d);
    }
    return sum_of(sum);
}
INLINE float mean_of(Feature x, int64_t start, int64_t end) {
    float sum = 0;
    for (int64_t c = start; c < end; c += K_BLOCK)
        sum += block_sum(x, c, smaller(c + K_BLOCK, end));
    return sum / (float)(end - start);
}
INLINE float variance_of(Feature x, float mean, int64_t start, int64_t end) {
    float sum = 0;
    for (int64_t c = start; c < end; c += K_BLOCK)
        sum += block_squares(x, mean, c, smaller(c + K_BLOCK, end));
    return sum / (float)(end - start);
}
INLINE void normalise(Feature x, Feature z, float mean, float inverse, int64_t start,
                      int64_t end) {
    for (int64_t c = start; c < end; c += LANES) {
        int64_t n = smaller(LANES, end - c);
        Lanes d = load_columns(x.row, x.step, c, n);
        for (int j = 0; j < LANES / VW; j++) d.part[j] = (d.part[j] - mean) * inverse;
        store_columns(z.row, z.step, c, n, d);
    }
}
INLINE vf inverse_of(vf variance, float eps) { return 1 / sqrt_(variance + eps); }

/* VW features, or fewer: `n` beginning with `first`. Their numbers are one vector. */
typedef struct {
    const Op *op;
    const Call *call;
    int64_t first, n;
    TreeSums means[VW], variances[VW]; /* up the tree */
} Group;

/* The running statistic after micro-batch m: old + momentum (new - old). */
INLINE void push_moved(Group *group, TreeSums *sums, int64_t m, int64_t place, vf new,
                       int is_empty) {
    vf old = load_part(group->call->running + place + group->first, group->n);
    float moved[VW];
    vf step = fma_(splat(group->op->f[1]), new - old, old);
    store(moved, is_empty ? old : step);
    for (int64_t j = 0; j < group->n; j++) push_sum(sums + j, m, moved[j]);
}

/* Micro-batch m of a group: its statistics, and what they normalise. */
static void take_statistics(Group *group, int64_t m) {
    const Op *op = group->op;
    const Call *call = group->call;
    int64_t features = op->i[4], first = group->first;
    int64_t start = call->starts[m], end = call->starts[m + 1], b = end - start;
    float means[VW] = {0}, variances[VW] = {0}, inverses[VW];
    for (int64_t j = 0; j < group->n && b > 0; j++) {
        Feature x = feature_of(call, op->i[0], features, first + j);
        means[j] = mean_of(x, start, end);
        variances[j] = variance_of(x, means[j], start, end);
    }
    vf variance = load(variances), inverse = inverse_of(variance, op->f[0]);
    store(inverses, inverse);
    for (int64_t j = 0; j < group->n && b > 0; j++)
        normalise(feature_of(call, op->i[0], features, first + j),
                  feature_of(call, op->i[2], features, first + j), means[j],
                  inverses[j], start, end);
    if (b > 0)
        store_part(call->buffers[op->i[3]] + m * features + first, inverse, group->n);
    float ratio = b > 1 ? (float)((double)b / (double)(b - 1)) : 0;
    vf unbiased = b > 1 ? variance * ratio : (vf){0};
    push_moved(group, group->means, m, op->i[7], load(means), b == 0);
    push_moved(group, group->variances, m, op->i[8], unbiased, b == 0);
}
static void take_all_statistics(const Op *op, const Call *call) {
    int64_t features = op->i[4];
    Group group = {.op = op, .call = call};
    for (int64_t f = 0; f < features; f += VW) {
        group.first = f, group.n = smaller(VW, features - f);
        for (int64_t j = 0; j < group.n; j++) {
            begin_sum(&group.means[j], call, call->tail + op->i[9] + f + j);
            begin_sum(&group.variances[j], call, call->tail + op->i[10] + f + j);
        }
        for (int64_t m = 0; m < call->micro_batches; m++) take_statistics(&group, m);
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
        vf weight = splat(weights_at(call, op->i[5])[f]);
        vf bias = splat(weights_at(call, op->i[6])[f]);
        float mean = 0, inverse = 1;
        if (op->flags & OP_EVAL) {
            mean = call->running[op->i[7] + f];
            inverse = inverse_of(splat(call->running[op->i[8] + f]), op->f[0])[0];
        }
        for (int64_t c = 0; c < PANEL; c += VW) {
            vf z = load(from + c);
            if (op->flags & OP_EVAL) z = (z - mean) * inverse;
            store(to + c, activate(fma_(z, weight, bias), op->flags, draws, c, f));
        }
    }
}

static void op_batch_norm(const Op *op, const Call *call) {
    if (!(op->flags & OP_EVAL)) take_all_statistics(op, call);
    Draws draws;
    for (int64_t first = 0; first < num_samples(call); first += PANEL) {
        if (op->flags & OP_DROPOUT)
            prepare_draws(&draws, call, first, op->i[4], op->i[11], op->f[2]);
        scale_and_shift(op, call, first, &draws);
    }
}

/* One feature on its way back. `y` is the gate: without a row, there is none. */
typedef struct {
    Feature dy, dx, y, z;
    float factor; /* of the gate */
} FeatureGradient;

/* The gradient behind the gate, in columns [c, c + n). */
INLINE Lanes gated_columns(const FeatureGradient *g, int64_t c, int64_t n) {
    Lanes dy = load_columns(g->dy.row, g->dy.step, c, n);
    if (!g->y.row) return dy;
    Lanes gate = load_columns(g->y.row, g->y.step, c, n);
    for (int j = 0; j < LANES / VW; j++)
        dy.part[j] = gated(dy.part[j], gate.part[j], g->factor);
    return dy;
}

/* Add the sums over a block, columns [start, end), of dy and dy z. */
INLINE void add_block(const FeatureGradient *g, int64_t start, int64_t end,
                      float *dbias, float *dweight) {
    Lanes sum = {0}, products = {0};
    for (int64_t c = start; c < end; c += LANES) {
        int64_t n = smaller(LANES, end - c);
        Lanes dy = gated_columns(g, c, n);
        Lanes z = load_columns(g->z.row, g->z.step, c, n);
        sum = add_lanes(sum, dy);
        for (int j = 0; j < LANES / VW; j++)
            products.part[j] += dy.part[j] * z.part[j];
    }
    *dbias += sum_of(sum), *dweight += sum_of(products);
}

/* dx = scale ((dy - mean) - z slope) in columns [start, end). */
INLINE void grad_columns(const FeatureGradient *g, int64_t start, int64_t end,
                         float scale, float mean, float slope) {
    for (int64_t c = start; c < end; c += LANES) {
        int64_t n = smaller(LANES, end - c);
        Lanes dx = gated_columns(g, c, n);
        Lanes z = load_columns(g->z.row, g->z.step, c, n);
        for (int j = 0; j < LANES / VW; j++)
            dx.part[j] = scale * ((dx.part[j] - mean) - z.part[j] * slope);
        store_columns(g->dx.row, g->dx.step, c, n, dx);
    }
}

/* One feature: the gradients of its weight and bias, then of its inputs. */
static void grad_feature(const Op *op, const Call *call, int64_t f) {
    int64_t features = op->i[5];
    FeatureGradient g = {.dy = feature_of(call, op->i[0], features, f),
                         .dx = feature_of(call, op->i[1], features, f),
                         .z = feature_of(call, op->i[3], features, f),
                         .factor = op->f[0]};
    if (op->i[2] >= 0) g.y = feature_of(call, op->i[2], features, f);
    const float *inverses = call->buffers[op->i[4]];
    float weight = weights_at(call, op->i[6])[f];
    TreeSums weights, biases;
    begin_sum(&weights, call, op->i[7] + f);
    begin_sum(&biases, call, op->i[8] + f);
    for (int64_t m = 0; m < call->micro_batches; m++) {
        int64_t start = call->starts[m], end = call->starts[m + 1];
        float dbias = 0, dweight = 0, b = (float)(end - start);
        for (int64_t c = start; c < end; c += K_BLOCK)
            add_block(&g, c, smaller(c + K_BLOCK, end), &dbias, &dweight);
        if (op->i[8] >= 0) push_sum(&biases, m, dbias);
        if (op->i[7] >= 0) push_sum(&weights, m, dweight);
        if (end > start)
            grad_columns(&g, start, end, weight * inverses[m * features + f], dbias / b,
                         dweight / b);
    }
}

static void op_batch_norm_grad(const Op *op, const Call *call) {
    for (int64_t f = 0; f < op->i[5]; f++) grad_feature(op, call, f);
}
