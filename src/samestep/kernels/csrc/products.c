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

/* Where positions lie: position p in rows [first + p step, ...) of a buffer. */
typedef struct {
    int64_t rows, first, step;
} Place;

INLINE Place place_at(const int64_t *i) { return (Place){i[0], i[1], i[2]}; }
/* The first row of a position, in a panel of samples. */
INLINE int64_t element_at(Place place, int64_t position, int64_t panel) {
    return (panel * place.rows + place.first + position * place.step) * PANEL;
}

/* A panel of samples at one position. */
typedef struct {
    int64_t position, panel;
    const float *b;
    float *c;
} Part;

/* Both products with the weights: c[row, sample] = sum over k of w[row, k] b[k,
 * sample], where w lies by row (forward) or by k (the inputs' gradient). */
typedef struct Product Product;
struct Product {
    const float *w;
    int64_t w_step; /* from one row to the next, or from one k to the next */
    int is_by_k;
    int64_t rows, terms, samples;
    int64_t positions; /* each a product of its own, with the same weights */
    Place from, to;    /* of b and c */
    const float *b;
    float *c;
    const Op *op;
    const Call *call;
    /* What is done to finished sums: rows [row, end) of columns [column, last). */
    void (*finish)(const Product *p, const Part *part, int64_t row, int64_t end,
                   int64_t column, int64_t last, const Draws *draws);
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

INLINE int64_t panels_of(const Product *p) { return parts_of(p->samples, PANEL); }
INLINE Part part_of(const Product *p, int64_t n) {
    int64_t panels = panels_of(p), position = n / panels, panel = n % panels;
    return (Part){position, panel, p->b + element_at(p->from, position, panel),
                  p->c + element_at(p->to, position, panel)};
}
/* The counters of a part's dropout; row r of position p is feature p rows + r. */
static void prepare_part(Draws *draws, const Product *p, const Part *part) {
    prepare_draws(draws, p->call, part->panel * PANEL, p->positions * p->rows,
                  p->op->i[6], p->op->f[0]);
}

/* One tile of rows, all vectors of one panel, one block of k. */
static void fill_rows(const Product *p, const Part *part, Tile *t, int64_t row,
                      int64_t rows, int64_t k, int is_by_k, const Draws *draws) {
    int64_t first = part->panel * PANEL, end = smaller(first + PANEL, p->samples);
    t->terms = smaller(K_BLOCK, p->terms - k);
    t->is_addition = k > 0;
    for (int64_t s = first; s < end; s += TILE_COLUMNS) {
        t->b = part->b + k * PANEL + s % PANEL;
        t->c = part->c + row * PANEL + s % PANEL;
        t->columns = parts_of(smaller(TILE_COLUMNS, end - s), VW) * VW;
        fetch_tile(t, rows, 0);
        fill(t, rows, is_by_k);
    }
    if (k + K_BLOCK >= p->terms && p->finish)
        p->finish(p, part, row, row + rows, first, end, draws);
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
    int64_t parts = p->positions * panels_of(p);
    for (int64_t n_part = 0; n_part < parts; n_part++) {
        Part part = part_of(p, n_part);
        Draws draws;
        if (p->op->flags & OP_DROPOUT && k + K_BLOCK >= p->terms)
            prepare_part(&draws, p, &part);
        /* The part that follows, a piece with each tile. */
        const float *next = part_of(p, (n_part + 1) % parts).b + k * PANEL;
        for (int64_t n = tile; n < last; n++) {
            int64_t row = first_row(p->rows, tiles, n);
            int64_t rows = first_row(p->rows, tiles, n + 1) - row;
            const float *w = first_weight(p, row, k);
            t.a = pack ? pack + (n - tile) * PACKED_TILE : w;
            /* The next tile's rows lie beside these, the next k's follow. */
            t.ahead = t.a + 2 * TILE_ROWS;
            if (pack) t.ahead = next + (n - tile) * AHEAD * K_BLOCK;
            if (pack && n_part == 0)
                (p->is_by_k ? pack_by_k : pack_by_row)((float *)t.a, w, p->w_step, rows,
                                                       terms);
            fill_rows(p, &part, &t, row, rows, k, p->is_by_k || pack, &draws);
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
    Part parts[PANELS_TO_PACK];
    int64_t panels = p->positions * panels_of(p);
    for (int64_t panel = 0; panel < panels; panel++) {
        parts[panel] = part_of(p, panel);
        if (p->op->flags & OP_DROPOUT) prepare_part(&draws[panel], p, &parts[panel]);
    }
    Tile t = {.c_step = PANEL, .a_step = p->w_step};
    for (int64_t n = 0; n < tiles; n++) {
        int64_t row = first_row(p->rows, tiles, n);
        int64_t rows = first_row(p->rows, tiles, n + 1) - row;
        for (int64_t panel = 0; panel < panels; panel++) {
            t.ahead_step = panel == 0 ? rows : 0;
            for (int64_t k = 0; k == 0 || k < p->terms; k += K_BLOCK) {
                t.a = first_weight(p, row, k);
                t.ahead = first_weight(p, row + rows, 0) + k * t.ahead_step;
                fill_rows(p, &parts[panel], &t, row, rows, k, 0, &draws[panel]);
            }
        }
    }
}

static void multiply(const Product *p) {
    int64_t tiles = parts_of(p->rows, TILE_ROWS);
    if (p->positions * panels_of(p) > PANELS_TO_PACK) {
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

static void finish_linear(const Product *p, const Part *part, int64_t row, int64_t end,
                          int64_t column, int64_t last, const Draws *draws) {
    const Op *op = p->op;
    const float *bias = op->i[5] < 0 ? NULL : weights_at(p->call, op->i[5]);
    for (int64_t r = row; r < end; r++)
        for (int64_t s = column; s < last; s += VW) {
            float *y = part->c + r * PANEL + s % PANEL;
            vf x = load(y);
            if (bias) x += splat(bias[r]);
            store(y, activate(x, op->flags, draws, s % PANEL,
                              part->position * p->rows + r));
        }
}

static void finish_grad_input(const Product *p, const Part *part, int64_t row,
                              int64_t end, int64_t column, int64_t last,
                              const Draws *draws) {
    (void)draws;
    const float *y = p->call->buffers[p->op->i[5]];
    float factor = p->op->f[0];
    for (int64_t r = row; r < end; r++)
        for (int64_t s = column; s < last; s += VW) {
            int64_t place = part->c - p->c + r * PANEL + s % PANEL;
            vf dx = load(p->c + place), gate = load(y + place);
            store(p->c + place, p->op->flags & OP_SLOPE ? dx * gate
                                : keep(~(gate <= 0), dx * factor));
        }
}

static void op_linear(const Op *op, const Call *call) {
    int64_t in = op->i[2], out = op->i[3];
    multiply(&(Product){.w = weights_at(call, op->i[4]),
                        .w_step = in,
                        .rows = out,
                        .terms = in,
                        .samples = call->starts[call->micro_batches],
                        .positions = op->i[7],
                        .from = place_at(op->i + 8),
                        .to = place_at(op->i + 11),
                        .b = call->buffers[op->i[0]],
                        .c = call->buffers[op->i[1]],
                        .op = op,
                        .call = call,
                        .finish = finish_linear});
}

static void op_linear_grad_input(const Op *op, const Call *call) {
    int64_t in = op->i[2], out = op->i[3];
    multiply(&(Product){.w = weights_at(call, op->i[4]),
                        .w_step = in,
                        .is_by_k = 1,
                        .rows = in,
                        .terms = out,
                        .samples = call->starts[call->micro_batches],
                        .positions = op->i[6],
                        .from = place_at(op->i + 7),
                        .to = place_at(op->i + 10),
                        .b = call->buffers[op->i[0]],
                        .c = call->buffers[op->i[1]],
                        .op = op,
                        .call = call,
                        .finish = op->i[5] < 0 ? NULL : finish_grad_input});
}
