/* Convolutions and the gradients of their inputs, by the tables of conv_terms.h: tiles
 * of channels and samples, pixel after pixel. */

/* c[r, columns] = sum over the table's terms of weight[r] source[columns], for pixels of
 * the same kind, one after the other. */
typedef struct {
    const Table *table;
    const float *pack, *source;
    int64_t step; /* of `source`, from one pixel to the next */
    int64_t pixels;
    int is_relu;
    const float *bias; /* of the first row, or NULL */
    const float *gate; /* as `c`, or NULL */
    float factor;
    int is_addition; /* to what is in c */
    float *c;
    int64_t c_step;
} ConvTile;

INLINE void sum_table(Sums sums, const ConvTile *t, const float *source, int rows,
                      int vectors) {
    clear_sums(sums, rows, vectors);
    const Term *end = t->table->terms + t->table->count;
    for (const Term *term = t->table->terms; term < end; term++) {
        const float *a = t->pack + term->weight, *b = source + term->source;
        vf row[TILE_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) row[v] = load(b + v * VW);
        UNROLL for (int r = 0; r < rows; r++) {
            vf x = splat(a[r]);
            UNROLL for (int v = 0; v < vectors; v++)
                sums[r][v] = fma_(x, row[v], sums[r][v]);
        }
    }
}

/* What follows the last block of terms, apart from dropout. */
INLINE void finish_sums(Sums sums, const ConvTile *t, int64_t pixel, int rows,
                        int vectors) {
    if (t->bias) {
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) sums[r][v] += splat(t->bias[r]);
    }
    if (t->is_relu) {
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = relu(sums[r][v]);
    }
    if (!t->gate) return;
    const float *gate = t->gate + pixel * PANEL;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[r][v] =
                gated(sums[r][v], load(gate + r * t->c_step + v * VW), t->factor);
}

INLINE void fill_conv_tile(const ConvTile *t, int rows, int vectors) {
    const float *source = t->source;
    float *c = t->c;
    for (int64_t pixel = 0; pixel < t->pixels; pixel++) {
        Sums sums;
        sum_table(sums, t, source, rows, vectors);
        if (t->is_addition) add_sums(sums, c, t->c_step, rows, vectors);
        finish_sums(sums, t, pixel, rows, vectors);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                store(c + r * t->c_step + v * VW, sums[r][v]);
        source += t->step;
        c += PANEL;
    }
}

typedef void (*FillConvTile)(const ConvTile *);
#define CONV_SHAPE(rows, vectors)                                \
    static void conv_##rows##x##vectors(const ConvTile *t) { \
        fill_conv_tile(t, rows, vectors);                        \
    }
#define NAME_CONV(rows, vectors) conv_##rows##x##vectors,
EACH_VECTORS(CONV_SHAPE, LIST_PLAIN)
static const FillConvTile conv_tiles[TILE_VECTORS][TILE_ROWS] = {
    EACH_VECTORS(NAME_CONV, LIST_BRACED)};

/* What the tiles of one panel have in common: samples [first, first + columns). */
typedef struct {
    const Gathering *g;
    Block *block;
    int64_t first, columns;
    const float *from, *gate;
    float *to;
    int is_last; /* block of terms */
    const Draws *draws;
} Strip;

INLINE void drop_out(const Strip *p, int64_t row, int64_t rows, int64_t pixel,
                     int64_t pixels) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = row + r * p->g->plane + pixel, end = i + pixels; i < end; i++)
            for (int64_t s = 0; s < p->columns; s += VW) {
                float *y = p->to + i * PANEL + s;
                store(y, dropout(load(y), p->draws, s, i));
            }
}

/* One tile of rows: `pixels` of the same kind, whose sources are `step` apart. */
static void fill_pixels(const Strip *p, const Table *table, int64_t tile,
                        int64_t source, int64_t step, int64_t pixel, int64_t pixels) {
    const Gathering *g = p->g;
    const Block *block = p->block;
    int64_t row = first_row(g->rows, block->tiles, tile);
    int64_t rows = first_row(g->rows, block->tiles, tile + 1) - row;
    row += block->group * g->rows;
    int64_t place = (row * g->plane + pixel) * PANEL;
    ConvTile t = {.table = table,
                  .pack = block->pack + (tile - block->tile) * PACKED_TILE,
                  .step = step * PANEL,
                  .pixels = pixels,
                  .is_addition = block->k > 0,
                  .c_step = g->plane * PANEL};
    if (p->is_last) {
        t.is_relu = g->op->flags & OP_RELU;
        t.bias = g->bias ? g->bias + row : NULL;
        t.factor = g->op->f[0];
    }
    for (int64_t s = 0; s < p->columns; s += TILE_COLUMNS) {
        int64_t vectors = parts_of(smaller(TILE_COLUMNS, p->columns - s), VW);
        t.source = p->from + source * PANEL + s;
        t.c = p->to + place + s;
        t.gate = p->is_last && p->gate ? p->gate + place + s : NULL;
        conv_tiles[vectors - 1][rows - 1](&t);
    }
    if (p->is_last && g->op->flags & OP_DROPOUT)
        drop_out(p, row * g->plane, rows, pixel, pixels);
}

/* Row `y` of the pixels: a tile's weights stay in the first cache from pixel to pixel,
 * and so does most of what they are multiplied with. */
static void fill_row(const Strip *p, int64_t y) {
    const Gathering *g = p->g;
    TapSpan rows = tap_span(&g->conv.y, g->is_gradient, y);
    int64_t base = p->block->group * g->sources * g->from_plane +
                   rows.source * g->from_width;
    for (int64_t n = p->block->tile; n < p->block->last; n++)
        for (int64_t x = 0, end; x < g->width; x = end) {
            TapSpan columns = tap_span(&g->conv.x, g->is_gradient, x);
            end = end_of_span(&g->conv.x, g->is_gradient, x, &columns);
            fill_pixels(p, table_of(g, p->block, &rows, &columns), n,
                        base + columns.source, g->is_gradient ? 1 : g->conv.x.stride,
                        y % g->lines * g->width + x, end - x);
        }
}

/* All pixels of one panel. */
static void fill_strip(const Gathering *g, Block *block, int64_t first) {
    Draws draws;
    if (g->op->flags & OP_DROPOUT)
        prepare_draws(&draws, g->call, first, g->to_rows, g->op->i[CONV_STREAM],
                      g->op->f[0]);
    Strip p = {.g = g,
               .block = block,
               .first = first,
               .columns = smaller(PANEL, g->samples - first),
               .from = g->from + first * g->from_rows,
               .gate = g->gate ? g->gate + first * g->to_rows : NULL,
               .to = g->to + first * g->to_rows,
               .is_last = block->k + block->terms == g->sources * g->conv.taps,
               .draws = &draws};
    for (int64_t y = 0; y < g->height; y++) {
        fill_row(&p, y);
        if (g->finish_line) g->finish_line(g, block, first, y);
    }
}

static void gather_products(const Gathering *g) {
    int64_t terms = g->sources * g->conv.taps, tiles = parts_of(g->rows, TILE_ROWS);
    Block block;
    block.tiles = tiles;
    for (block.group = 0; block.group < g->conv.groups; block.group++)
        for (block.k = 0; block.k < terms; block.k += K_BLOCK) {
            block.terms = smaller(K_BLOCK, terms - block.k);
            for (int64_t n = 0; n < TABLES; n++) block.tables[n].kind = -1;
            for (block.tile = 0; block.tile < tiles; block.tile += PACK_TILES) {
                block.last = smaller(block.tile + PACK_TILES, tiles);
                pack_tiles(g, &block);
                for (int64_t s = 0; s < g->samples; s += PANEL)
                    fill_strip(g, &block, s);
            }
        }
}

INLINE const float *parameters_at(const Call *call, int64_t offset) {
    return offset < 0 ? NULL : weights_at(call, offset);
}

static Gathering forward_of(const Op *op, const Call *call) {
    Conv c = conv_of(op);
    return (Gathering){.conv = c,
                       .rows = c.out,
                       .sources = c.in,
                       .height = c.y.out,
                       .width = c.x.out,
                       .lines = c.y.out,
                       .plane = c.y.out * c.x.out,
                       .from_width = c.x.in,
                       .from_plane = c.y.in * c.x.in,
                       .samples = num_samples(call),
                       .from_rows = op->i[2] * c.y.in * c.x.in,
                       .to_rows = op->i[3] * c.y.out * c.x.out,
                       .w = weights_at(call, op->i[CONV_WEIGHT]),
                       .from = call->buffers[op->i[0]],
                       .to = call->buffers[op->i[1]],
                       .op = op,
                       .call = call,
                       .bias = parameters_at(call, op->i[CONV_BIAS])};
}
static void op_conv(const Op *op, const Call *call) {
    Gathering g = forward_of(op, call);
    gather_products(&g);
}

static void op_conv_grad_input(const Op *op, const Call *call) {
    Conv c = conv_of(op);
    Gathering g = {.conv = c,
                   .is_gradient = 1,
                   .rows = c.in,
                   .sources = c.out,
                   .height = c.y.in,
                   .width = c.x.in,
                   .lines = c.y.in,
                   .plane = c.y.in * c.x.in,
                   .from_width = c.x.out,
                   .from_plane = c.y.out * c.x.out,
                   .samples = num_samples(call),
                   .from_rows = op->i[3] * c.y.out * c.x.out,
                   .to_rows = op->i[2] * c.y.in * c.x.in,
                   .w = weights_at(call, op->i[CONV_WEIGHT]),
                   .from = call->buffers[op->i[0]],
                   .to = call->buffers[op->i[1]],
                   .op = op,
                   .call = call,
                   .bias = parameters_at(call, op->i[CONV_INPUT_BIAS]),
                   .gate = buffer_or_null(call, op->i[CONV_GATE])};
    gather_products(&g);
}
