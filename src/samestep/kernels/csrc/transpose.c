/* From panels by feature to panels by sample. */

/* Transpose a block of VW x VW: zipping the halves log2(VW) times is a rotation of the
 * digits of (row, column). */
INLINE void transpose_block(vf block[VW]) {
    for (int round = 1; round < VW; round *= 2) {
        vf zipped[VW];
        UNROLL for (int j = 0; j < VW / 2; j++) {
            zipped[2 * j] = zip_low(block[j], block[j + VW / 2]);
            zipped[2 * j + 1] = zip_high(block[j], block[j + VW / 2]);
        }
        UNROLL for (int j = 0; j < VW; j++) block[j] = zipped[j];
    }
}

/* y[c, r] = x[r, c] of a block of at most VW x VW, rows PANEL apart. */
INLINE void transpose_part(const float *x, float *y, int64_t rows) {
    vf block[VW];
    for (int64_t j = 0; j < VW; j++)
        block[j] = j < rows ? load(x + j * PANEL) : (vf){0};
    transpose_block(block);
    UNROLL for (int64_t j = 0; j < VW; j++) store(y + j * PANEL, block[j]);
}

/* One panel of samples at one position, by blocks of 32 x 32: whole lines of the cache
 * on both sides. `step` is from one panel of features to the next. */
static void transpose_panel(const float *x, float *y, int64_t features, int64_t step) {
    for (int64_t f = 0; f < features; f += VW)
        for (int64_t s = 0; s < PANEL; s += VW)
            transpose_part(x + f * PANEL + s,
                           y + f / PANEL * step + s * PANEL + f % PANEL, features - f);
}

static void op_transpose(const Op *op, const Call *call) {
    int64_t samples = call->starts[call->micro_batches], positions = op->i[3];
    int64_t step = positions * call->capacity * PANEL;
    for (int64_t s = 0; s < samples; s += PANEL)
        for (int64_t p = 0; p < positions; p++) {
            int64_t row = s / PANEL * op->i[4] + op->i[5] + p * op->i[6];
            transpose_panel(call->buffers[op->i[0]] + row * PANEL,
                            call->buffers[op->i[1]] + (p * call->capacity + s) * PANEL,
                            op->i[2], step);
        }
}
