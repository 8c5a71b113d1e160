/* From panels by feature to panels by sample. */

static void op_transpose(const Op *op, const Call *call) {
    const float *x = call->buffers[op->i[0]];
    float *y = call->buffers[op->i[1]];
    int64_t features = op->i[2], samples = call->starts[call->micro_batches];
    for (int64_t f = 0; f < features; f++)
        for (int64_t s = 0; s < samples; s++)
            y[(f / PANEL * call->capacity + s) * PANEL + f % PANEL] =
                x[(s / PANEL * features + f) * PANEL + s % PANEL];
}
