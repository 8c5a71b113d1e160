/* Products of matrices within each sample, and softmax: lanes are samples. */

#define MATMUL_ROWS 4
#define MATMUL_COLUMNS 4

typedef struct {
    const float *a, *b;
    int64_t terms, a_row, a_term, b_term, b_column; /* strides in floats */
} Factors;

/* One tile of outputs; rows and columns beyond `rows` and `columns` repeat the last. */
INLINE void matmul_tile(const Factors *f, int64_t rows, int64_t columns, vf *sums) {
    vf blocks[MATMUL_ROWS * MATMUL_COLUMNS] = {0};
    for (int64_t start = 0; start < f->terms; start += K_BLOCK) {
        int64_t end = smaller(start + K_BLOCK, f->terms);
        vf sum[MATMUL_ROWS * MATMUL_COLUMNS] = {0};
        for (int64_t k = start; k < end; k++) {
            vf b[MATMUL_COLUMNS];
            for (int n = 0; n < MATMUL_COLUMNS; n++)
                b[n] = load(f->b + k * f->b_term + smaller(n, columns - 1) * f->b_column);
            for (int m = 0; m < MATMUL_ROWS; m++) {
                vf a = load(f->a + k * f->a_term + smaller(m, rows - 1) * f->a_row);
                for (int n = 0; n < MATMUL_COLUMNS; n++)
                    sum[m * MATMUL_COLUMNS + n] =
                        fma_(a, b[n], sum[m * MATMUL_COLUMNS + n]);
            }
        }
        for (int n = 0; n < MATMUL_ROWS * MATMUL_COLUMNS; n++)
            blocks[n] = start ? blocks[n] + sum[n] : sum[n];
    }
    for (int n = 0; n < MATMUL_ROWS * MATMUL_COLUMNS; n++) sums[n] = blocks[n];
}

/* One matrix of one vector of samples. */
static void matmul_matrix(const Factors *all, int64_t height, int64_t width, float *y) {
    for (int64_t m = 0; m < height; m += MATMUL_ROWS)
        for (int64_t n = 0; n < width; n += MATMUL_COLUMNS) {
            vf sums[MATMUL_ROWS * MATMUL_COLUMNS];
            Factors tile = *all;
            tile.a += m * all->a_row, tile.b += n * all->b_column;
            int64_t rows = smaller(MATMUL_ROWS, height - m);
            int64_t columns = smaller(MATMUL_COLUMNS, width - n);
            matmul_tile(&tile, rows, columns, sums);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < columns; j++)
                    store(y + ((m + i) * width + n + j) * PANEL,
                          sums[i * MATMUL_COLUMNS + j]);
        }
}

static void op_matmul(const Op *op, const Call *call) {
    const int64_t *i = op->i, groups = i[7], height = i[8], width = i[9];
    for (int64_t s = 0; s < num_samples(call); s += PANEL) {
        const float *a = call->buffers[i[0]] + s * i[3] + i[4] * PANEL;
        const float *b = call->buffers[i[2]] + s * i[5] + i[6] * PANEL;
        float *y = call->buffers[i[1]] + s * (groups * height * width);
        int64_t columns = columns_at(call, s);
        for (int64_t g = 0; g < groups; g++)
            for (int64_t c = 0; c < columns; c += VW) {
                Factors all = {.a = a + g * i[11] * PANEL + c,
                               .b = b + g * i[14] * PANEL + c,
                               .terms = i[10],
                               .a_row = i[12] * PANEL,
                               .a_term = i[13] * PANEL,
                               .b_term = i[15] * PANEL,
                               .b_column = i[16] * PANEL};
                matmul_matrix(&all, height, width,
                              y + g * height * width * PANEL + c);
            }
    }
}

/* `count` rows of one vector of samples. */
INLINE void softmax_rows(const float *x, float *y, int64_t count, int64_t is_safe) {
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
                             count, op->i[4]);
            }
}
