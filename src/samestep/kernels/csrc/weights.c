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
INLINE float *align(float *p) {
    return (float *)(((uintptr_t)p + 63) & ~(uintptr_t)63);
}

/* How many tiles of rows share a block of x; of few samples x is small, and what counts
 * is that rows of dW are written from one end to the other. */
#define TILES_TOGETHER 8
#define FEW_SAMPLES 128
#define MOST_TOGETHER 64 /* sums of a stack: 800 kB of stacks */

typedef struct {
    const Call *call;
    const float *dy; /* by feature */
    const float *x;  /* by sample */
    int64_t in, positions;
    Place of_dy, of_x; /* x: positions, the first one, step */
    const MicroBatch *micro_batches;
    int64_t num_micro_batches;
    int64_t first, rows; /* of dW: those that are computed */
    float *const *sums;  /* where the sums that are left go: element (r, c) to */
    int64_t place, step; /* place + r * step + c */
    int64_t tiles;    /* of TILE_ROWS rows at most */
    int64_t together; /* how many of them share a block of x */
    const Chain *chains;
    int64_t num_chains;
    int64_t stack_size;
    float *stack; /* tiles, for each tile of rows that is summed */
} WeightGradient;

/* Elements from one position of x to the next. */
INLINE int64_t position_of_x(const WeightGradient *g) {
    return g->of_x.step * g->call->capacity * PANEL;
}

/* The chains of all micro-batches in order, blocks of K_BLOCK terms: samples of the
 * first position, then of the next. Returns how many there are; with NULL only that. */
static int64_t list_chains(const WeightGradient *g, Chain *chains) {
    int64_t n = 0, size = 0;
    for (int64_t m = 0; m < g->num_micro_batches; m++) {
        const MicroBatch *part = &g->micro_batches[m];
        int64_t first = part->first, end = part->end, distance = part->distance;
        int64_t b = end - first, all = g->positions * b, k = 0;
        do {
            int64_t terms = smaller(K_BLOCK, all - k), position = b ? k / b : 0;
            int64_t merges = k > 0;
            if (k + terms == all) merges += part->merges;
            if (chains)
                chains[n] = (Chain){.a = distance + position * g->of_dy.step * PANEL,
                                    .b = distance + position * position_of_x(g),
                                    .sample = first + k - position * b,
                                    .first = first,
                                    .end = end,
                                    .terms = terms,
                                    .merges = merges,
                                    .size = size};
            size += 1 - merges;
            k += terms;
            n++;
        } while (k < all);
    }
    return n;
}

/* The first chain after `chain` that is no longer among the first K_BLOCK samples. */
static const Chain *end_of_block(const Chain *chain, const Chain *end) {
    int64_t terms = 0;
    do terms += chain++->terms;
    while (chain < end && terms + chain->terms <= K_BLOCK);
    return chain;
}

/* How many sums of a tile wait at most. */
static int64_t stack_of(const Chain *chains, int64_t count) {
    int64_t most = 0;
    for (const Chain *chain = chains; chain < chains + count; chain++)
        most = chain->size >= most ? chain->size + 1 : most;
    return most;
}

/* The tile's sums that are left on the stack, all but the last. */
static void copy_sums(const WeightGradient *g, const float *stack, int64_t size,
                      int64_t rows, int64_t place, int64_t columns) {
    for (int64_t n = 0; n < size; n++)
        for (int64_t r = 0; r < rows; r++)
            memcpy(g->sums[n] + place + r * g->step,
                   stack + n * TILE_SIZE + r * TILE_COLUMNS, columns * sizeof(float));
}

/* The first row of tile n. */
INLINE int64_t tile_row(const WeightGradient *g, int64_t n) {
    return g->first + first_row(g->rows, g->tiles, n);
}

/* Tile n of dW, the chains of one block: TILE_COLUMNS columns from `column`. */
static void sum_tile(const WeightGradient *g, Tile *t, int64_t n, int64_t column) {
    int64_t row = tile_row(g, n), rows = tile_row(g, n + 1) - row;
    int64_t left = t->last->size - t->last->merges;
    int64_t place = g->place + row * g->step + column;
    t->a = g->dy + (g->of_dy.first + row) * PANEL;
    t->c = g->sums[left] + place;
    if (t->end > t->last) fetch_tile(t, rows, g->together > 1 ? 0 : TILE_COLUMNS);
    by_chains[parts_of(t->columns, VW) - 1][rows - 1](t);
    if (t->end > t->last) copy_sums(g, t->stack, left, rows, place, t->columns);
}

/* Tiles [first, last) of rows, all micro-batches: a block of x stays in the first cache
 * while the rows pass by, each with a stack of its own. */
static void sum_column(const WeightGradient *g, int64_t first, int64_t last,
                       int64_t column) {
    const Chain *end = g->chains + g->num_chains;
    int64_t position = column / PANEL * g->of_x.rows + g->of_x.first;
    Tile t = {.a_step = PANEL,
              .b = g->x + position * g->call->capacity * PANEL + column % PANEL,
              .jump = g->of_dy.rows * PANEL,
              .a_position = g->of_dy.step * PANEL,
              .b_position = position_of_x(g),
              .last = end - 1,
              .c_step = g->step,
              .columns = smaller(TILE_COLUMNS, g->in - column)};
    for (t.chains = g->chains; t.chains < end; t.chains = t.end) {
        t.end = end_of_block(t.chains, end);
        for (int64_t n = first; n < last; n++) {
            t.stack = g->stack + (n - first) * g->stack_size * TILE_SIZE;
            sum_tile(g, &t, n, column);
        }
    }
}

/* The rows [first, end) of the gradient of an operation's matrix, without where the
 * sums go. */
static WeightGradient weight_gradient(const Op *op, const Call *call,
                                      const MicroBatch *micro_batches, int64_t count,
                                      int64_t first, int64_t end) {
    int64_t samples = 0;
    for (int64_t m = 0; m < count; m++)
        samples += micro_batches[m].end - micro_batches[m].first;
    return (WeightGradient){
        .call = call,
        .dy = call->buffers[op->i[0]],
        .x = call->buffers[op->i[1]],
        .in = op->i[2],
        .positions = op->i[5],
        .of_dy = place_at(op->i + 6),
        .of_x = place_at(op->i + 9),
        .micro_batches = micro_batches,
        .num_micro_batches = count,
        .first = first,
        .rows = end - first,
        .tiles = parts_of(end - first, TILE_ROWS),
        .together = samples * op->i[5] > FEW_SAMPLES ? TILES_TOGETHER : 1};
}

static void op_linear_grad_weight(const Op *op, const Call *call) {
    MicroBatch micro_batches[call->micro_batches];
    for (int64_t m = 0; m < call->micro_batches; m++)
        micro_batches[m] = (MicroBatch){.first = call->starts[m],
                                        .end = call->starts[m + 1],
                                        .merges = call->merges[m]};
    WeightGradient g = weight_gradient(op, call, micro_batches, call->micro_batches, 0,
                                       op->i[3]);
    Chain chains[list_chains(&g, NULL)];
    g.chains = chains;
    g.num_chains = list_chains(&g, chains);
    g.stack_size = stack_of(chains, g.num_chains);
    if (g.stack_size > MOST_TOGETHER) g.together = 1;
    float room[g.together * g.stack_size * TILE_SIZE + LINE];
    g.stack = align(room);
    g.sums = call->slots;
    g.place = op->i[4];
    g.step = g.in;
    for (int64_t n = 0; n < g.tiles; n += g.together)
        for (int64_t column = 0; column < g.in; column += TILE_COLUMNS)
            sum_column(&g, n, smaller(n + g.together, g.tiles), column);
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

/* The sums of `size` rows over the samples, up the tree into the slots from `place` on;
 * a panel has `rows` rows. */
static void sum_rows_to_slots(const Call *call, const float *x, int64_t rows, int64_t size,
                     int64_t place) {
    int64_t step = rows * PANEL;
    vf stack[stack_size(call)];
    for (int64_t f = 0; f < size; f += VW) {
        int64_t there = smaller(VW, size - f), height = 0;
        for (int64_t m = 0; m < call->micro_batches; m++) {
            stack[height++] = sum_features(x + f * PANEL, there, step, call->starts[m],
                                           call->starts[m + 1]);
            for (int64_t j = call->merges[m]; j > 0; j--, height--)
                stack[height - 2] += stack[height - 1];
        }
        for (int64_t j = 0; j < height; j++)
            store_part(call->slots[j] + place + f, stack[j], there);
    }
}

static void op_grad_bias(const Op *op, const Call *call) {
    const float *dy = call->buffers[op->i[0]] + op->i[4] * PANEL;
    sum_rows_to_slots(call, dy, op->i[3], op->i[1], op->i[2]);
}

/* Several gradients of one parameter: see OP_LEAVES. */
static void op_add_leaves(const Op *op, const Call *call) {
    int64_t uses = op->i[1], size = op->i[2], step = call->micro_batches * size;
    vf stack[stack_size(call)];
    for (int64_t e = 0; e < size; e += VW) {
        int64_t n = smaller(VW, size - e), height = 0;
        for (int64_t m = 0; m < call->micro_batches; m++) {
            const float *leaf = call->buffers[op->i[0]] + m * size + e;
            vf sum = load_part(leaf, n);
            for (int64_t use = 1; use < uses; use++)
                sum += load_part(leaf + use * step, n);
            stack[height++] = sum;
            for (int64_t j = call->merges[m]; j > 0; j--, height--)
                stack[height - 2] += stack[height - 1];
        }
        for (int64_t j = 0; j < height; j++)
            store_part(call->slots[j] + op->i[3] + e, stack[j], n);
    }
}
