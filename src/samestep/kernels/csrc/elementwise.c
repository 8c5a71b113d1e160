/* Activations, their gradients, and outputs for the caller. Whole panels are computed,
 * padding too: an element depends on nothing beside it. */

INLINE int64_t num_samples(const Call *call) {
    return call->starts[call->micro_batches];
}
/* Row `feature` of the panel that begins at column `first`, by feature. */
INLINE float *row_of(float *matrix, int64_t first, int64_t features, int64_t feature) {
    return matrix + (first / PANEL * features + feature) * PANEL;
}

static void op_activate(const Op *op, const Call *call) {
    float *x = call->buffers[op->i[0]], *y = call->buffers[op->i[1]];
    int64_t features = op->i[2];
    Draws draws;
    for (int64_t first = 0; first < num_samples(call); first += PANEL) {
        if (op->flags & OP_DROPOUT)
            prepare_draws(&draws, call, first, features, op->i[3], op->f[0]);
        for (int64_t f = 0; f < features; f++) {
            const float *from = row_of(x, first, features, f);
            float *to = row_of(y, first, features, f);
            for (int64_t c = 0; c < PANEL; c += VW)
                store(to + c, activate(load(from + c), op->flags, &draws, c, f));
        }
    }
}

static void op_draw(const Op *op, const Call *call) {
    int64_t features = op->i[1];
    Draws draws;
    for (int64_t first = 0; first < num_samples(call); first += PANEL) {
        prepare_draws(&draws, call, first, features, op->i[2], 0);
        for (int64_t f = 0; f < features; f++) {
            float *to = row_of(call->buffers[op->i[0]], first, features, f);
            for (int64_t c = 0; c < PANEL; c += VW) {
                vf number = to_float((vi)(drawn(&draws, c, f) >> 8)) * 0x1p-24f;
                store(to + c, number + op->f[0]);
            }
        }
    }
}

/* gate <= 0 ? +0 : dy * factor; a gate that is a NaN is open. */
INLINE vf gated(vf dy, vf gate, float factor) {
    return keep(~(gate <= 0), dy * factor);
}

static void op_gate(const Op *op, const Call *call) {
    const float *dy = call->buffers[op->i[0]], *gate = call->buffers[op->i[2]];
    float *dx = call->buffers[op->i[1]];
    int64_t size = parts_of(num_samples(call), PANEL) * op->i[3] * PANEL;
    for (int64_t i = 0; i < size; i += VW)
        store(dx + i, gated(load(dy + i), load(gate + i), op->f[0]));
}

static void op_store(const Op *op, const Call *call) {
    float *x = call->buffers[op->i[0]];
    int64_t features = op->i[1], samples = num_samples(call);
    for (int64_t first = 0; first < samples; first += PANEL)
        for (int64_t s = first; s < samples && s < first + PANEL; s++)
            for (int64_t f = 0; f < features; f++)
                call->outputs[s * features + f] =
                    row_of(x, first, features, f)[s - first];
}
