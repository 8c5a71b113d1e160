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

/* Terms of few samples at one position are read where they are, a tile after the other,
 * so that rows of dW are written from one end to the other. More terms are packed, a
 * block of them: the lines of a tile are far apart, and would share few sets of the
 * cache. Packed rows stay in the second cache while the columns pass by, packed columns
 * in the first one while the rows do. */
#define FEW_SAMPLES 128
#define ROWS_TOGETHER 96
#define TILES_TOGETHER (ROWS_TOGETHER / TILE_ROWS)
#define MOST_TOGETHER 64         /* sums of a stack */
#define ROOM_OF_STACKS (1 << 18) /* floats: 1 MB */

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
    int64_t tiles;       /* of TILE_ROWS rows at most */
    int is_packed;
    int64_t together; /* how many tiles share packed columns */
    int64_t columns;  /* how many share packed rows */
    int64_t row[TILES_TOGETHER + 1]; /* where they begin, and where the last one ends */
    const Chain *chains;
    int64_t num_chains;
    int64_t stack_size;
    float *stack; /* tiles, for each tile that is summed at a time */
} WeightGradient;

/* The chains of all micro-batches in order, blocks of K_BLOCK terms: samples of the
 * first position, then of the next. Returns how many there are; with NULL only that. */
static int64_t list_chains(const WeightGradient *g, Chain *chains) {
    int64_t n = 0, size = 0;
    for (int64_t m = 0; m < g->num_micro_batches; m++) {
        const MicroBatch *part = &g->micro_batches[m];
        int64_t first = part->first, end = part->end;
        int64_t b = end - first, all = g->positions * b, k = 0;
        do {
            int64_t terms = smaller(K_BLOCK, all - k), position = b ? k / b : 0;
            int64_t merges = k > 0;
            if (k + terms == all) merges += part->merges;
            if (chains)
                chains[n] = (Chain){.distance = part->distance,
                                    .position = position,
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

/* Take tiles [first, last) of rows: it needs divisions, which every column would repeat. */
static void take_rows(WeightGradient *g, int64_t first, int64_t last) {
    for (int64_t n = first; n <= last; n++)
        g->row[n - first] = g->first + first_row(g->rows, g->tiles, n);
}

/* Tile n of those taken, the chains of a block: columns from `column`. */
static void sum_tile(const WeightGradient *g, Tile *t, int64_t n, int64_t column,
                     const FillTile tiles[TILE_VECTORS][TILE_ROWS]) {
    int64_t row = g->row[n], rows = g->row[n + 1] - row;
    int64_t left = t->last->size - t->last->merges;
    int64_t place = g->place + row * g->step + column;
    t->c = g->sums[left] + place;
    if (t->end > t->last) fetch_tile(t, rows, g->is_packed ? 0 : TILE_COLUMNS);
    tiles[parts_of(t->columns, VW) - 1][rows - 1](t);
    if (t->end > t->last) copy_sums(g, t->stack, left, rows, place, t->columns);
}

/* x of the first position, columns from `column`. */
INLINE const float *columns_of_x(const WeightGradient *g, int64_t column) {
    int64_t position = column / PANEL * g->of_x.rows + g->of_x.first;
    return g->x + position * g->call->capacity * PANEL + column % PANEL;
}

/* The tile that was taken, where its terms are: columns [column, end). */
static void sum_in_place(const WeightGradient *g, int64_t column, int64_t end) {
    Tile t; /* clearing what chains do not read would take tens of cycles */
    t.a = g->dy + (g->of_dy.first + g->row[0]) * PANEL;
    t.jump = g->of_dy.rows * PANEL;
    t.chains = g->chains;
    t.end = g->chains + g->num_chains;
    t.last = t.end - 1;
    t.stack = g->stack;
    t.c_step = g->step;
    for (; column < end; column += TILE_COLUMNS) {
        t.b = columns_of_x(g, column);
        t.columns = smaller(TILE_COLUMNS, end - column);
        sum_tile(g, &t, 0, column, by_chains);
    }
}

/* Terms that follow each other in memory: samples of a panel at one position. */
typedef struct {
    int64_t distance, position, sample, terms;
} Piece;

/* The pieces of a block's chains; returns how many there are. */
static int64_t list_pieces(const Chain *chain, const Chain *end, Piece *pieces) {
    int64_t count = 0;
    for (; chain < end; chain++) {
        Piece piece = {chain->distance, chain->position, chain->sample, 0};
        for (int64_t left = chain->terms; left > 0; left -= piece.terms) {
            piece.terms = smaller(PANEL - piece.sample % PANEL,
                                  chain->end - piece.sample);
            piece.terms = smaller(piece.terms, left);
            pieces[count++] = piece;
            piece.sample += piece.terms;
            if (piece.sample < chain->end) continue;
            piece.sample = chain->first;
            piece.position++;
        }
    }
    return count;
}

/* Where the first of the rows that were taken, or a column, has a piece's terms. */
INLINE const float *dy_of_piece(const WeightGradient *g, const Piece *piece) {
    int64_t row = piece->sample / PANEL * g->of_dy.rows + g->of_dy.first + g->row[0] +
                  piece->position * g->of_dy.step;
    return g->dy + piece->distance + row * PANEL + piece->sample % PANEL;
}
INLINE const float *x_of_piece(const WeightGradient *g, const Piece *piece,
                               const float *x) {
    int64_t row = piece->position * g->of_x.step * g->call->capacity;
    return x + piece->distance + (row + piece->sample) * PANEL;
}

/* Whole vectors are stored: the end of each is what the next one stores, or room. What
 * follows is fetched meanwhile: pieces are no stream that a processor foresees. */
static void pack_rows(const WeightGradient *g, const Piece *pieces, int64_t count,
                      int64_t rows, float *pack) {
    for (int64_t n = 0; n < count; pack += pieces[n++].terms) {
        const float *a = dy_of_piece(g, &pieces[n]);
        const float *next = dy_of_piece(g, &pieces[smaller(n + 1, count - 1)]);
        int64_t terms = pieces[n].terms;
        for (int64_t r = 0; r < rows; r++) {
            __builtin_prefetch(next + r * PANEL);
            for (int64_t k = 0; k < terms; k += VW)
                store(pack + r * PACKED_ROW + k,
                      load_part(a + r * PANEL + k, smaller(VW, terms - k)));
        }
    }
}
static void pack_columns(const WeightGradient *g, const Piece *pieces, int64_t count,
                         int64_t column, float *pack) {
    const float *x = columns_of_x(g, column);
    for (int64_t n = 0; n < count; n++) {
        const float *b = x_of_piece(g, &pieces[n], x);
        const float *next = x_of_piece(g, &pieces[smaller(n + 4, count - 1)], x);
        for (int64_t k = 0; k < pieces[n].terms; k++, pack += TILE_COLUMNS) {
            __builtin_prefetch(next + k * PANEL);
            UNROLL for (int v = 0; v < TILE_VECTORS; v++)
                store(pack + v * VW, load(b + k * PANEL + v * VW));
        }
    }
}

/* The `count` tiles of rows that were taken, packed: columns [column, end). */
static void sum_packed(const WeightGradient *g, int64_t count, int64_t first,
                       int64_t end) {
    float rows[ROWS_TOGETHER * PACKED_ROW] __attribute__((aligned(64)));
    float columns[K_BLOCK * TILE_COLUMNS] __attribute__((aligned(64)));
    Piece pieces[K_BLOCK];
    Tile t;
    t.b = columns;
    t.last = g->chains + g->num_chains - 1;
    t.c_step = g->step;
    t.ahead_step = LINE / 2;
    for (t.chains = g->chains; t.chains <= t.last; t.chains = t.end) {
        t.end = end_of_block(t.chains, t.last + 1);
        int64_t num_pieces = list_pieces(t.chains, t.end, pieces);
        pack_rows(g, pieces, num_pieces, g->row[count] - g->row[0], rows);
        t.stack = g->stack;
        for (int64_t column = first; column < end; column += TILE_COLUMNS) {
            pack_columns(g, pieces, num_pieces, column, columns);
            t.columns = smaller(TILE_COLUMNS, end - column);
            for (int64_t n = 0; n < count; n++) {
                t.a = rows + (g->row[n] - g->row[0]) * PACKED_ROW;
                t.ahead = rows + (g->row[n + 1] - g->row[0]) * PACKED_ROW;
                sum_tile(g, &t, n, column, by_packed);
                t.stack += g->stack_size * TILE_SIZE;
            }
        }
    }
}

/* The `count` tiles that were taken, all micro-batches: columns [column, end). */
static void sum_strip(const WeightGradient *g, int64_t count, int64_t column,
                      int64_t end) {
    if (!g->is_packed)
        sum_in_place(g, column, end);
    else
        for (; column < end; column += g->columns)
            sum_packed(g, count, column, smaller(column + g->columns, end));
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
        .is_packed = op->i[5] > 1 || samples > FEW_SAMPLES};
}

/* Take the chains; say how much is summed at a time. Returns the floats of stacks. */
static int64_t take_chains(WeightGradient *g, Chain *chains) {
    g->chains = chains;
    g->num_chains = list_chains(g, chains);
    g->stack_size = stack_of(chains, g->num_chains);
    g->together = 1;
    if (g->is_packed && g->stack_size <= MOST_TOGETHER)
        g->together = parts_of(g->tiles, parts_of(g->tiles, TILES_TOGETHER));
    int64_t of_column = g->together * g->stack_size * TILE_SIZE;
    int64_t most = g->is_packed ? ROOM_OF_STACKS / of_column : 1;
    int64_t tiles = smaller(most ? most : 1, parts_of(g->in, TILE_COLUMNS));
    g->columns = tiles * TILE_COLUMNS;
    return tiles * of_column;
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
    float room[take_chains(&g, chains) + LINE];
    g.stack = align(room);
    g.sums = call->slots;
    g.place = op->i[4];
    g.step = g.in;
    for (int64_t n = 0; n < g.tiles; n += g.together) {
        int64_t count = smaller(g.together, g.tiles - n);
        take_rows(&g, n, n + count);
        sum_strip(&g, count, 0, g.in);
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
