/* Gradients of weights and biases: each micro-batch's sum, and the canonical tree over
 * micro-batches, tile by tile while both are in registers or in the nearest cache.
 *
 * Sums that wait for their partner lie on a stack. After micro-batch m, merges[m] sums
 * are complete: each adds the two on top. What is left in the end is one sum for each
 * subtree that this worker has, and goes to the slots. */

/* How many sums the stack holds at most. */
static int64_t stack_size(const Call *call) {
    int64_t size = 0, most = 0;
    for (int64_t m = 0; m < call->micro_batches; m++) {
        size++;
        most = size > most ? size : most;
        size -= call->merges[m];
    }
    return most;
}

/* Stacks begin with a line of the cache: stores across two lines would cost a third of
 * the sums of 16 samples. */
#define LINE 16 /* floats */
INLINE float *align(float *p) {
    return (float *)(((uintptr_t)p + 63) & ~(uintptr_t)63);
}

typedef struct {
    const Call *call;
    const float *dy; /* panels [out, samples] */
    const float *x;  /* panels [samples, in] */
    int64_t in, out;
    int64_t offset;  /* of the weight in a slot */
    float *stack;    /* tiles */
} WeightGradient;

/* The tile's sums that are left on the stack, all but the last. */
static void copy_to_slots(const WeightGradient *g, int64_t size, int64_t rows,
                          int64_t row, int64_t column, int64_t columns) {
    for (int64_t n = 0; n < size; n++)
        for (int64_t r = 0; r < rows; r++)
            memcpy(g->call->slots[n] + g->offset + (row + r) * g->in + column,
                   g->stack + n * TILE_SIZE + r * PANEL, columns * sizeof(float));
}

/* The sum over samples [s, s + terms), added to the `merges` sums on top of the stack,
 * takes their place; the last of all goes to its slot. Returns the stack's size. */
static int64_t add_samples(const WeightGradient *g, Tile *t, int64_t rows, int64_t s,
                           int64_t terms, int64_t size, float *slot) {
    int64_t base = size - t->merges;
    t->terms = terms;
    t->until = PANEL - s % PANEL;
    t->sums = g->stack + (size - 1) * TILE_SIZE;
    t->c = slot ? slot : g->stack + base * TILE_SIZE;
    t->c_step = slot ? g->in : PANEL;
    fill(t, rows, 0);
    return base + 1;
}

/* A tile of dW, all micro-batches: rows [row, row + rows), columns of one panel. */
static void sum_tile(const WeightGradient *g, int64_t row, int64_t rows, int64_t column,
                     int64_t columns) {
    const Call *call = g->call;
    const float *dy = g->dy + row * PANEL;
    const float *x = g->x + column / PANEL * call->capacity * PANEL + column % PANEL;
    Tile t = {.a_step = PANEL, .jump = (g->out - 1) * PANEL, .columns = columns};
    int64_t size = 0;
    for (int64_t m = 0; m < call->micro_batches; m++) {
        int64_t first = call->starts[m], end = call->starts[m + 1], s = first;
        do {
            int64_t terms = smaller(K_BLOCK, end - s);
            int is_end = s + terms == end;
            t.merges = (s > first) + (is_end ? call->merges[m] : 0);
            t.a = dy + s / PANEL * g->out * PANEL + s % PANEL;
            t.b = x + s * PANEL;
            float *slot = NULL;
            if (is_end && m == call->micro_batches - 1)
                slot = call->slots[size - t.merges] + g->offset + row * g->in + column;
            size = add_samples(g, &t, rows, s, terms, size, slot);
            s += terms;
        } while (s < end);
    }
    copy_to_slots(g, size - 1, rows, row, column, columns);
}

/* Elements of x that stay in the second cache while the rows of dy pass by. */
#define GROUP_SIZE (1 << 16)

static void op_linear_grad_weight(const Op *op, const Call *call) {
    float room[stack_size(call) * TILE_SIZE + LINE];
    const WeightGradient g = {.call = call,
                              .dy = call->buffers[op->i[0]],
                              .x = call->buffers[op->i[1]],
                              .in = op->i[2],
                              .out = op->i[3],
                              .offset = op->i[4],
                              .stack = align(room)};
    int64_t tiles = parts_of(g.out, TILE_ROWS);
    int64_t group = (GROUP_SIZE / (call->capacity * PANEL + 1) + 1) * PANEL;
    for (int64_t first = 0; first < g.in; first += group)
        for (int64_t n = 0; n < tiles; n++) {
            int64_t row = first_row(g.out, tiles, n);
            int64_t rows = first_row(g.out, tiles, n + 1) - row;
            int64_t end = smaller(first + group, g.in);
            for (int64_t column = first; column < end; column += TILE_COLUMNS)
                sum_tile(&g, row, rows, column, smaller(TILE_COLUMNS, g.in - column));
        }
}

/* The lanes of one feature's sum over a block, samples [first, end). */
static Lanes sum_samples(const float *row, int64_t step, int64_t first, int64_t end) {
    Lanes sum = {0};
    for (int64_t s = first; s < end; s += LANES)
        sum = add_lanes(sum, load_columns(row, step, s, smaller(LANES, end - s)));
    return sum;
}

/* The sums of VW features (of `rows` that exist) over a block. Lanes are transposed, so
 * that features are side by side and the tree of lanes is additions. */
static vf sum_block(const float *dy, int64_t rows, int64_t step, int64_t first,
                    int64_t end) {
    vf lanes[LANES];
    for (int64_t r = 0; r < VW; r++) {
        Lanes sum = {0};
        if (r < rows) sum = sum_samples(dy + r * PANEL, step, first, end);
        for (int j = 0; j < LANES / VW; j++) lanes[j * VW + r] = sum.part[j];
    }
    for (int j = 0; j < LANES; j += VW) transpose_block(lanes + j);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

/* Their sums over one micro-batch, samples [first, end). */
static vf sum_features(const float *dy, int64_t rows, int64_t step, int64_t first,
                       int64_t end) {
    vf sum = {0};
    for (int64_t s = first; s < end; s += K_BLOCK)
        sum += sum_block(dy, rows, step, s, smaller(s + K_BLOCK, end));
    return sum;
}

static void op_grad_bias(const Op *op, const Call *call) {
    int64_t features = op->i[1], step = features * PANEL;
    vf stack[stack_size(call)];
    for (int64_t f = 0; f < features; f += VW) {
        const float *dy = call->buffers[op->i[0]] + f * PANEL;
        int64_t rows = smaller(VW, features - f), size = 0;
        for (int64_t m = 0; m < call->micro_batches; m++) {
            stack[size++] =
                sum_features(dy, rows, step, call->starts[m], call->starts[m + 1]);
            for (int64_t j = call->merges[m]; j > 0; j--, size--)
                stack[size - 2] += stack[size - 1];
        }
        for (int64_t j = 0; j < size; j++)
            store_part(call->slots[j] + op->i[2] + f, stack[j], rows);
    }
}
