/* Rows that are sums of other rows, by constant lists of terms. */

/* One row of y, of `terms` rows of x. */
INLINE void combine_row(const float *x, const int32_t *rows, const float *weights,
                        int64_t terms, float *y, int64_t columns) {
    for (int64_t c = 0; c < columns; c += VW) {
        ChainSum sum = {0};
        for (int64_t k = 0; k < terms; k++) {
            vf part = load(x + (int64_t)rows[k] * PANEL + c);
            if (!weights) {
                add_in_order(&sum, part);
                continue;
            }
            next_block(&sum);
            sum.block = fma_(splat(weights[k]), part, sum.block);
        }
        store(y + c, sum_in_order(&sum));
    }
}

static void op_combine(const Op *op, const Call *call) {
    typedef int32_t __attribute__((may_alias)) Number;
    const Number *ends = (const Number *)weights_at(call, op->i[4]);
    const Number *terms = (const Number *)weights_at(call, op->i[5]);
    const float *weights = op->i[6] == -1 ? NULL : weights_at(call, op->i[6]);
    for (int64_t s = 0; s < num_samples(call); s += PANEL) {
        const float *x = call->buffers[op->i[0]] + s * op->i[2];
        float *y = call->buffers[op->i[1]] + s * op->i[3];
        int64_t columns = columns_at(call, s);
        for (int64_t r = 0; r < op->i[3]; r++, y += PANEL) {
            const Number *rows = terms + ends[r];
            int64_t count = ends[r + 1] - ends[r];
            if (count == 1 && !weights)
                memcpy(y, x + (int64_t)rows[0] * PANEL, sizeof(float[PANEL]));
            else
                combine_row(x, rows, weights ? weights + ends[r] : NULL, count, y,
                            columns);
        }
    }
}
