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

/* By blocks of 32 x 32: whole lines of the cache on both sides. */
static void op_transpose(const Op *op, const Call *call) {
    const float *x = call->buffers[op->i[0]];
    float *y = call->buffers[op->i[1]];
    int64_t features = op->i[2], samples = call->starts[call->micro_batches];
    for (int64_t s0 = 0; s0 < samples; s0 += PANEL)
        for (int64_t f = 0; f < features; f += VW)
            for (int64_t s = s0; s < s0 + PANEL; s += VW)
                transpose_part(x + (s0 / PANEL * features + f) * PANEL + s % PANEL,
                               y + (f / PANEL * call->capacity + s) * PANEL + f % PANEL,
                               features - f);
}
