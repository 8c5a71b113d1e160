/* The products of a linear layer, from tiles. */

INLINE int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Where tile n of `tiles` begins, when `rows` rows are cut into tiles that differ by at
 * most one row: 11 and 12 instead of many 12 and one of 2. */
INLINE int64_t first_row(int64_t rows, int64_t tiles, int64_t n) {
    return rows * n / tiles;
}

static __attribute__((noinline)) void fill(const Tile *t, int64_t rows, int is_by_k) {
    int64_t vectors = parts_of(t->columns, VW);
    if (is_by_k)
        by_k[vectors - 1][rows - 1](t);
    else
        by_row[vectors - 1][rows - 1](t);
}

/* Both products with the weights: c[row, sample] = sum over k of w[row, k] b[k,
 * sample], where w lies by row (forward) or by k (the inputs' gradient). */
typedef struct Product Product;
struct Product {
    const float *w;
    int64_t w_step; /* from one row to the next, or from one k to the next */
    int is_by_k;
    int64_t rows, terms, samples;
    const float *b; /* panels [terms, samples] */
    float *c;       /* panels [rows, samples] */
    const Op *op;
    const Call *call;
    /* What is done to finished sums: rows [row, end) of columns [column, last). */
    void (*finish)(const Product *p, int64_t row, int64_t end, int64_t column,
                   int64_t last, const Draws *draws);
};

/* Weights are packed where many panels of samples share them: tiles of TILE_ROWS floats
 * for each k, one after the other, are read faster than rows that lie far apart. Whole
 * vectors are stored, so each ends in what is stored next, and the last one behind. */
#define PACK_TILES 8
#define PACKED_TILE (TILE_ROWS * K_BLOCK)
#define PANELS_TO_PACK 4
#define AHEAD (PANEL / PACK_TILES) /* floats of the next panel with each k of a tile */

/* Copy a tile of w [rows, terms] that lies by row, transposed. */
static void pack_by_row(float *pack, const float *w, int64_t step, int64_t rows,
                        int64_t terms) {
    for (int64_t k = 0; k < terms; k += VW)
        for (int64_t r = (rows - 1) / VW * VW; r >= 0; r -= VW) {
            vf block[VW];
            for (int64_t j = 0; j < VW; j++)
                block[j] = r + j >= rows ? (vf){0}
                                         : load_part(w + (r + j) * step + k,
                                                     smaller(VW, terms - k));
            transpose_block(block);
            UNROLL for (int64_t j = 0; j < VW; j++)
                store(pack + (k + j) * TILE_ROWS + r, block[j]);
        }
}

static void pack_by_k(float *pack, const float *w, int64_t step, int64_t rows,
                      int64_t terms) {
    for (int64_t k = 0; k < terms; k++)
        for (int64_t r = 0; r < rows; r += VW)
            store(pack + k * TILE_ROWS + r,
                  load_part(w + k * step + r, smaller(VW, rows - r)));
}

/* Fetch what a tile of sums is added to or written to while it is summed, or the tile
 * that begins `ahead` columns later: sums lie far away, or another core has read them. */
INLINE void fetch_tile(const Tile *t, int64_t rows, int64_t ahead) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t s = 0; s < t->columns; s += LINE)
            __builtin_prefetch(t->c + r * t->c_step + ahead + s, 1);
}

/* One tile of rows, all vectors of one panel, one block of k. */
static void fill_rows(const Product *p, Tile *t, int64_t row, int64_t rows,
                      int64_t panel, int64_t k, int is_by_k, const Draws *draws) {
    int64_t first = panel * PANEL, end = smaller(first + PANEL, p->samples);
    t->terms = smaller(K_BLOCK, p->terms - k);
    t->is_addition = k > 0;
    for (int64_t s = first; s < end; s += TILE_COLUMNS) {
        t->b = p->b + (panel * p->terms + k) * PANEL + s % PANEL;
        t->c = p->c + (panel * p->rows + row) * PANEL + s % PANEL;
        t->columns = parts_of(smaller(TILE_COLUMNS, end - s), VW) * VW;
        fetch_tile(t, rows, 0);
        fill(t, rows, is_by_k);
    }
    if (k + K_BLOCK >= p->terms && p->finish)
        p->finish(p, row, row + rows, first, end, draws);
}

INLINE const float *first_weight(const Product *p, int64_t row, int64_t k) {
    return p->w + (p->is_by_k ? row + k * p->w_step : row * p->w_step + k);
}

/* Tiles [tile, last) of rows for one block of k: all panels. */
static void fill_group(const Product *p, int64_t k, int64_t tile, int64_t last,
                       int64_t tiles, float *pack) {
    Tile t = {.c_step = PANEL, .a_step = pack ? TILE_ROWS : p->w_step};
    t.ahead_step = pack ? AHEAD : p->is_by_k ? t.a_step : 0;
    int64_t terms = smaller(K_BLOCK, p->terms - k);
    int64_t panels = parts_of(p->samples, PANEL);
    for (int64_t panel = 0; panel < panels; panel++) {
        Draws draws;
        if (p->op->flags & OP_DROPOUT && k + K_BLOCK >= p->terms)
            prepare_draws(&draws, p->call, panel * PANEL, p->rows, p->op->i[6],
                          p->op->f[0]);
        /* The panel that follows, a piece with each tile. */
        const float *next = p->b + ((panel + 1) % panels * p->terms + k) * PANEL;
        for (int64_t n = tile; n < last; n++) {
            int64_t row = first_row(p->rows, tiles, n);
            int64_t rows = first_row(p->rows, tiles, n + 1) - row;
            const float *w = first_weight(p, row, k);
            t.a = pack ? pack + (n - tile) * PACKED_TILE : w;
            /* The next tile's rows lie beside these, the next k's follow. */
            t.ahead = t.a + 2 * TILE_ROWS;
            if (pack) t.ahead = next + (n - tile) * AHEAD * K_BLOCK;
            if (pack && panel == 0)
                (p->is_by_k ? pack_by_k : pack_by_row)((float *)t.a, w, p->w_step, rows,
                                                       terms);
            fill_rows(p, &t, row, rows, panel, k, p->is_by_k || pack, &draws);
        }
    }
}

static void multiply_packed(const Product *p, int64_t tiles) {
    float pack[PACK_TILES * PACKED_TILE + VW] __attribute__((aligned(64)));
    for (int64_t k = 0; k == 0 || k < p->terms; k += K_BLOCK)
        for (int64_t n = 0; n < tiles; n += PACK_TILES)
            fill_group(p, k, n, smaller(n + PACK_TILES, tiles), tiles, pack);
}

/* Weights by row that few panels share are read once, from the first to the last. The
 * next tile's are fetched meanwhile: another core has just updated half of them. */
static void multiply_in_order(const Product *p, int64_t tiles) {
    Draws draws[PANELS_TO_PACK];
    int64_t panels = parts_of(p->samples, PANEL);
    for (int64_t panel = 0; panel < panels && p->op->flags & OP_DROPOUT; panel++)
        prepare_draws(&draws[panel], p->call, panel * PANEL, p->rows, p->op->i[6],
                      p->op->f[0]);
    Tile t = {.c_step = PANEL, .a_step = p->w_step};
    for (int64_t n = 0; n < tiles; n++) {
        int64_t row = first_row(p->rows, tiles, n);
        int64_t rows = first_row(p->rows, tiles, n + 1) - row;
        for (int64_t panel = 0; panel < panels; panel++) {
            t.ahead_step = panel == 0 ? rows : 0;
            for (int64_t k = 0; k == 0 || k < p->terms; k += K_BLOCK) {
                t.a = first_weight(p, row, k);
                t.ahead = first_weight(p, row + rows, 0) + k * t.ahead_step;
                fill_rows(p, &t, row, rows, panel, k, 0, &draws[panel]);
            }
        }
    }
}

static void multiply(const Product *p) {
    int64_t tiles = parts_of(p->rows, TILE_ROWS);
    if (p->samples > PANELS_TO_PACK * PANEL) {
        multiply_packed(p, tiles);
        return;
    }
    if (!p->is_by_k) {
        multiply_in_order(p, tiles);
        return;
    }
    for (int64_t k = 0; k == 0 || k < p->terms; k += K_BLOCK)
        fill_group(p, k, 0, tiles, tiles, NULL);
}

static void finish_linear(const Product *p, int64_t row, int64_t end, int64_t column,
                          int64_t last, const Draws *draws) {
    const Op *op = p->op;
    const float *bias = op->i[5] < 0 ? NULL : p->call->parameters + op->i[5];
    for (int64_t r = row; r < end; r++)
        for (int64_t s = column; s < last; s += VW) {
            float *y = p->c + (column / PANEL * p->rows + r) * PANEL + s % PANEL;
            vf x = load(y);
            if (bias) x += splat(bias[r]);
            store(y, activate(x, op->flags, draws, s % PANEL, r));
        }
}

static void finish_grad_input(const Product *p, int64_t row, int64_t end,
                              int64_t column, int64_t last, const Draws *draws) {
    (void)draws;
    const float *y = p->call->buffers[p->op->i[5]];
    vf factor = splat(p->op->f[0]);
    for (int64_t r = row; r < end; r++)
        for (int64_t s = column; s < last; s += VW) {
            int64_t place = (column / PANEL * p->rows + r) * PANEL + s % PANEL;
            vf dx = load(p->c + place) * factor;
            store(p->c + place, keep(~(load(y + place) <= 0), dx));
        }
}

static void op_linear(const Op *op, const Call *call) {
    int64_t in = op->i[2], out = op->i[3];
    multiply(&(Product){.w = call->parameters + op->i[4],
                        .w_step = in,
                        .rows = out,
                        .terms = in,
                        .samples = call->starts[call->micro_batches],
                        .b = call->buffers[op->i[0]],
                        .c = call->buffers[op->i[1]],
                        .op = op,
                        .call = call,
                        .finish = finish_linear});
}

static void op_linear_grad_input(const Op *op, const Call *call) {
    int64_t in = op->i[2], out = op->i[3];
    multiply(&(Product){.w = call->parameters + op->i[4],
                        .w_step = in,
                        .is_by_k = 1,
                        .rows = in,
                        .terms = out,
                        .samples = call->starts[call->micro_batches],
                        .b = call->buffers[op->i[0]],
                        .c = call->buffers[op->i[1]],
                        .op = op,
                        .call = call,
                        .finish = op->i[5] < 0 ? NULL : finish_grad_input});
}
