/* Losses and their gradients. Every lane is a sample; of a sample's sums over classes
 * or values, the sixteen lanes are vectors. */

/* Reductions of VW samples: the sums of the blocks so far, the lanes of this block. */
typedef struct {
    vf blocks;
    vf lane[LANES];
} SumsOfSamples;

INLINE void end_block(SumsOfSamples *sums) {
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) sums->lane[l] += sums->lane[l + half];
    sums->blocks += sums->lane[0];
    for (int l = 0; l < LANES; l++) sums->lane[l] = (vf){0};
}
/* Add term n, which is the next. */
INLINE void add_term(SumsOfSamples *sums, int64_t n, vf x) {
    sums->lane[n % LANES] += x;
    if (n % K_BLOCK == K_BLOCK - 1) end_block(sums);
}
INLINE vf sum_of_terms(SumsOfSamples *sums) {
    end_block(sums);
    return sums->blocks;
}
/* |x| < 2^-64 ? +0 : x */
INLINE vf without_tiny(vf x) { return keep(~(abs_(x) < 0x1p-64f), x); }

/* VW columns of a matrix by feature; row f begins at x + f * PANEL. What is measured of
 * column c lies at `place` + c * `step`: at `place` among several positions. */
typedef struct {
    const float *x;
    int64_t rows, column, samples;
    int64_t place, step;
} Columns;

INLINE int64_t target_at(Columns columns, int64_t j) {
    return (columns.column + j) * columns.step + columns.place;
}

INLINE vf row_at(Columns columns, int64_t row) { return load(columns.x + row * PANEL); }

/* The largest logit and the first class that has it; a NaN is larger than all. */
INLINE vf top_of(Columns logits, vi *answer) {
    vf top = row_at(logits, 0);
    *answer = (vi){0};
    for (int64_t c = 1; c < logits.rows; c++) {
        vf x = row_at(logits, c);
        vi is_better = (x > top) | ((x != x) & (top == top));
        top = select_(is_better, x, top);
        *answer = (is_better & (int32_t)c) | (~is_better & *answer);
    }
    return top;
}
/* exp(x - top), and +0 below exp(-64): no subnormals, which are slow. */
INLINE vf exp_below(vf x, vf top) {
    vf d = x - top;
    return keep(~(d < -64), exp_(d));
}

/* The labels of VW samples; what has none counts as ignored, like padding. A label that
 * is no class, which a caller should have refused, gives NaN. */
typedef struct {
    vi label, is_ignored;
    vf logit; /* of the label */
    int is_mixed;
    vf share;   /* of the label; of the partner, the rest */
    vi partner; /* the second label, which is a class */
    vf partner_logit;
} Targets;

INLINE Targets targets_of(const Op *op, const Call *call, Columns logits) {
    Targets targets = {.label = splat_int(-1),
                       .is_ignored = splat_int(-1),
                       .logit = splat(__builtin_nanf("")),
                       .is_mixed = call->partners != NULL};
    for (int j = 0; j < VW && logits.column + j < logits.samples; j++) {
        int64_t label = call->labels[target_at(logits, j)];
        targets.is_ignored[j] = -(label == op->i[3]);
        if (label < 0 || label >= logits.rows) continue;
        targets.label[j] = (int32_t)label;
        targets.logit[j] = logits.x[label * PANEL + j];
        if (!targets.is_mixed) continue;
        int64_t partner = call->partners[logits.column + j];
        targets.share[j] = call->shares[logits.column + j];
        targets.partner[j] = (int32_t)partner;
        if (partner >= 0 && partner < logits.rows)
            targets.partner_logit[j] = logits.x[partner * PANEL + j];
    }
    return targets;
}

/* The losses, from the largest logits and the logarithms of the sums. */
INLINE vf losses_of(Columns logits, Targets targets, vf top, vf l, float smoothing) {
    vf loss = l + (top - targets.logit);
    if (targets.is_mixed) {
        vf other = l + (top - targets.partner_logit);
        loss = fma_(targets.share, loss, (1 - targets.share) * other);
    }
    if (smoothing == 0) return loss;
    SumsOfSamples sums = {0};
    for (int64_t c = 0; c < logits.rows; c++)
        add_term(&sums, c, l + (top - row_at(logits, c)));
    vf even = splat((float)((double)smoothing / (double)logits.rows));
    vf own = splat((float)(1 - (double)smoothing));
    return fma_(own, loss, even * sum_of_terms(&sums));
}

INLINE void store_answers(const Call *call, Columns logits, Targets targets,
                          vi answer, vf loss) {
    for (int j = 0; j < VW && logits.column + j < logits.samples; j++) {
        int64_t s = target_at(logits, j);
        call->losses[s] = targets.is_ignored[j] ? 0 : loss[j];
        int is_right = answer[j] == targets.label[j] && !targets.is_ignored[j];
        call->metrics[s] = (float)is_right;
        if (call->answers) call->answers[s] = answer[j];
    }
}

/* The gradients take the place of the exponentials e^(x - top), or of the logits. */
INLINE void store_gradients(float *to, Columns logits, Targets targets, vf top,
                            vf total, float smoothing, float weight) {
    float even = (float)((double)smoothing / (double)logits.rows);
    vf own = splat((float)(1 - (double)smoothing));
    vi is_invalid = ~targets.is_ignored & (targets.label < 0);
    vf invalid = keep(is_invalid, splat(__builtin_nanf("")));
    for (int64_t c = 0; c < logits.rows; c++) {
        vi is_label = targets.label == (int32_t)c;
        vf q = select_(is_label, own + even, splat(even));
        if (targets.is_mixed) {
            q = select_(is_label, fma_(own, targets.share, splat(even)), splat(even));
            q = select_(targets.partner == (int32_t)c,
                        fma_(own, 1 - targets.share, q), q);
        }
        vf e = load(to + c * PANEL);
        if (to == logits.x) e = exp_below(e, top);
        vf dx = (e / total - q) * weight;
        dx = select_(is_invalid, invalid, without_tiny(dx));
        store(to + c * PANEL, keep(~targets.is_ignored, dx));
    }
}

INLINE void cross_entropy(const Op *op, const Call *call, Columns logits, float *to) {
    float smoothing = op->f[0];
    vi answer;
    vf top = top_of(logits, &answer);
    SumsOfSamples sums = {0};
    for (int64_t c = 0; c < logits.rows; c++) {
        vf e = exp_below(row_at(logits, c), top);
        add_term(&sums, c, e);
        if (to && to != logits.x) store(to + c * PANEL, e);
    }
    vf total = sum_of_terms(&sums);
    Targets targets = targets_of(op, call, logits);
    vf loss = losses_of(logits, targets, top, log_(total), smoothing);
    store_answers(call, logits, targets, answer, loss);
    if (to) store_gradients(to, logits, targets, top, total, smoothing, call->weight);
}

/* The sums over each micro-batch, in double, one by one: by sample, then position. */
static void sum_losses(const Call *call, int64_t positions) {
    for (int64_t m = 0; m < call->micro_batches; m++) {
        double loss = 0, metric = 0;
        for (int64_t s = call->starts[m] * positions;
             s < call->starts[m + 1] * positions; s++) {
            loss += (double)call->losses[s];
            metric += (double)call->metrics[s];
        }
        if (call->loss_sums) call->loss_sums[m] = loss;
        if (call->metric_sums) call->metric_sums[m] = metric;
    }
}

/* Where column c of a buffer by feature begins; NULL for no buffer. */
INLINE float *column_of(const Call *call, int64_t buffer, int64_t rows, int64_t c) {
    if (buffer < 0) return NULL;
    return call->buffers[buffer] + c / PANEL * rows * PANEL + c % PANEL;
}

static void op_cross_entropy(const Op *op, const Call *call) {
    int64_t classes = op->i[2], samples = num_samples(call), positions = op->i[4];
    if (positions == 0) positions = 1;
    for (int64_t c = 0; c < samples; c += VW)
        for (int64_t p = 0; p < positions; p++) {
            const float *x = column_of(call, op->i[0], positions * classes, c);
            float *dx = column_of(call, op->i[1], positions * classes, c);
            int64_t rows = p * classes * PANEL;
            Columns logits = {x + rows, classes, c, samples, p, positions};
            cross_entropy(op, call, logits, dx ? dx + rows : NULL);
        }
    sum_losses(call, positions);
}

INLINE void squared_error(const Call *call, Columns outputs, float *to) {
    SumsOfSamples squares = {0}, errors = {0};
    int64_t n = smaller(VW, outputs.samples - outputs.column);
    for (int64_t v = 0; v < outputs.rows; v++) {
        float targets[VW] = {0};
        for (int64_t j = 0; j < n; j++)
            targets[j] = call->targets[(outputs.column + j) * outputs.rows + v];
        vf d = row_at(outputs, v) - load(targets);
        add_term(&squares, v, d * d);
        add_term(&errors, v, abs_(d));
        if (to) store(to + v * PANEL, d * call->weight);
    }
    store_part(call->losses + outputs.column, sum_of_terms(&squares) / 2, n);
    store_part(call->metrics + outputs.column, sum_of_terms(&errors), n);
}

static void op_squared_error(const Op *op, const Call *call) {
    int64_t values = op->i[2], samples = num_samples(call);
    for (int64_t c = 0; c < samples; c += VW) {
        const float *x = column_of(call, op->i[0], values, c);
        Columns outputs = {x, values, c, samples, 0, 1};
        squared_error(call, outputs, column_of(call, op->i[1], values, c));
    }
    sum_losses(call, 1);
}

/* What a loss of the user's own measures: the losses [samples, cells], and their sums
 * over each micro-batch, in double, one by one. */
static void op_measure(const Op *op, const Call *call) {
    int64_t cells = op->i[2], samples = num_samples(call);
    for (int64_t s = 0; s < samples; s++)
        for (int64_t c = 0; c < cells; c++) {
            const float *x = column_of(call, op->i[0], cells, s);
            call->losses[s * cells + c] = x[c * PANEL];
        }
    for (int64_t m = 0; m < call->micro_batches; m++)
        for (int64_t c = 0; c < cells; c++) {
            double sum = 0;
            for (int64_t s = call->starts[m]; s < call->starts[m + 1]; s++)
                sum += (double)call->losses[s * cells + c];
            call->loss_sums[m * cells + c] = sum;
        }
    for (int64_t s = 0; op->i[1] >= 0 && s < samples; s += VW)
        store(column_of(call, op->i[1], 1, s), splat(call->weight));
}

/* The label of a column at a position, or -1. */
INLINE int64_t label_at(const Call *call, int64_t buffer, int64_t positions, int64_t p,
                        int64_t column, int64_t classes) {
    int32_t label;
    memcpy(&label, column_of(call, buffer, positions, column) + p * PANEL, sizeof label);
    return label >= 0 && label < classes ? label : -1;
}

static void op_pick(const Op *op, const Call *call) {
    int64_t positions = op->i[3], classes = op->i[4], samples = num_samples(call);
    for (int64_t p = 0; p < positions; p++)
        for (int64_t s = 0; s < samples; s++) {
            const float *x = column_of(call, op->i[0], positions * classes, s);
            int64_t label = label_at(call, op->i[2], positions, p, s, classes);
            float y = label < 0 ? __builtin_nanf("") : x[(p * classes + label) * PANEL];
            column_of(call, op->i[1], positions, s)[p * PANEL] = y;
        }
}

static void op_pick_grad(const Op *op, const Call *call) {
    int64_t positions = op->i[3], classes = op->i[4], samples = num_samples(call);
    for (int64_t s = 0; s < samples; s += VW)
        for (int64_t p = 0; p < positions; p++) {
            vi label = splat_int(-1);
            for (int64_t j = 0; j < VW && s + j < samples; j++)
                label[j] =
                    (int32_t)label_at(call, op->i[2], positions, p, s + j, classes);
            vf dy = load(column_of(call, op->i[0], positions, s) + p * PANEL);
            float *dx = column_of(call, op->i[1], positions * classes, s);
            for (int64_t c = 0; c < classes; c++)
                store(dx + (p * classes + c) * PANEL, keep(label == (int32_t)c, dy));
        }
}
