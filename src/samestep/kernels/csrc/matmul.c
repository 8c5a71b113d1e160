/* Products of matrices within each sample, and softmax: lanes are samples. */

static void op_matmul(const Op *op, const Call *call) {
    const int64_t *i = op->i, groups = i[7], height = i[8], width = i[9];
    for (int64_t s = 0; s < num_samples(call); s += PANEL) {
        float *a = call->buffers[i[0]] + s * i[3] + i[4] * PANEL;
        float *b = call->buffers[i[2]] + s * i[5] + i[6] * PANEL;
        float *y = call->buffers[i[1]] + s * (groups * height * width);
        int64_t columns = columns_at(call, s);
        for (int64_t g = 0; g < groups; g++)
            for (int64_t c = 0; c < columns; c += VW) {
                Matrix a_g = {a + g * i[11] * PANEL + c, i[12] * PANEL, i[13] * PANEL};
                Matrix b_g = {b + g * i[14] * PANEL + c, i[15] * PANEL, i[16] * PANEL};
                Matrix y_g = {y + g * height * width * PANEL + c, width * PANEL, PANEL};
                for (int64_t m = 0; m < height; m += BLOCK_ROWS)
                    multiply_all(matrix_at(y_g, m, 0), matrix_at(a_g, m, 0), b_g,
                                 smaller(BLOCK_ROWS, height - m), width, i[10]);
            }
    }
}

/* Logarithms of the shares, from the exponentials' sum. */
INLINE void log_shares(const float *x, float *y, int64_t count, vf top, vf total) {
    vf l = log_(total);
    for (int64_t n = 0; n < count; n++)
        store(y + n * PANEL, (load(x + n * PANEL) - top) - l);
}

/* `count` rows of one vector of samples. */
INLINE void softmax_rows(const float *x, float *y, int64_t count, int64_t is_safe,
                         int64_t is_log) {
    vf top = load(x);
    for (int64_t n = 1; n < count; n++) {
        vf next = load(x + n * PANEL);
        top = select_((next > top) | (next != next), next, top);
    }
    ChainSum sum = {0};
    for (int64_t n = 0; n < count; n++) {
        vf e = exp_(load(x + n * PANEL) - top);
        store(y + n * PANEL, e);
        add_in_order(&sum, e);
    }
    vf total = sum_in_order(&sum);
    if (is_log) {
        log_shares(x, y, count, top, total);
        return;
    }
    vi empty = is_safe ? top == splat(-__builtin_inff()) : splat_int(0);
    for (int64_t n = 0; n < count; n++) {
        vf share = load(y + n * PANEL) / total;
        store(y + n * PANEL, keep(~empty, share));
    }
}

static void op_softmax(const Op *op, const Call *call) {
    int64_t rows = op->i[2], count = op->i[3];
    for (int64_t s = 0; s < num_samples(call); s += PANEL)
        for (int64_t row = 0; row < rows; row += count)
            for (int64_t c = 0; c < columns_at(call, s); c += VW) {
                int64_t at = s * rows + row * PANEL + c;
                softmax_rows(call->buffers[op->i[0]] + at, call->buffers[op->i[1]] + at,
                             count, op->i[4], op->i[5]);
            }
}
