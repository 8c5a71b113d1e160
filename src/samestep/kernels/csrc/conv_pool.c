/* Convolutions whose results are pooled at once. The lines of pixels of one row of
 * windows, of one panel, stay in the second cache between the two; what a convolution
 * writes otherwise is several times what is left of it. */

/* As of OP_CONV; then: */
enum { POOL_WHERE = 18, POOL_ROOM, POOL_HEIGHT, POOL_WIDTH };

static Pool pool_of(const Op *op, const Conv *conv) {
    int64_t height = op->i[POOL_HEIGHT], width = op->i[POOL_WIDTH];
    Pool p = {.op = op,
              .y = {conv->y.out, conv->y.out / height, height, height, 0, 1},
              .x = {conv->x.out, conv->x.out / width, width, width, 0, 1},
              .pixels = conv->y.out * conv->x.out};
    p.out = p.y.out * p.x.out;
    return p;
}

/* After the last line of a row of windows: pool the block's channels. */
static void pool_lines(const Gathering *g, const Block *block, int64_t first,
                       int64_t line) {
    if ((line + 1) % g->lines) return;
    const Pool *p = g->pool;
    int64_t row = line / g->lines, before = block->group * g->rows;
    int64_t c = before + first_row(g->rows, block->tiles, block->tile);
    int64_t end = before + first_row(g->rows, block->tiles, block->last);
    float *y = g->call->buffers[p->op->i[1]];
    float *where = buffer_or_null(g->call, p->op->i[POOL_WHERE]);
    for (; c < end; c++) {
        int64_t plane = first / PANEL * p->op->i[3] + c;
        int64_t place = (plane * p->out + row * p->x.out) * PANEL;
        p->row(p, (Span){0, g->lines, g->lines}, row * g->lines * g->width,
               g->to + c * g->plane * PANEL, y + place, where ? where + place : NULL);
    }
}

static void op_conv_max_pool(const Op *op, const Call *call) {
    Op plain = *op;
    plain.flags = 0; /* the ReLU follows the pooling */
    Gathering g = forward_of(&plain, call);
    Pool p = pool_of(op, &g.conv);
    p.row = take_largest_row;
    g.pool = &p, g.finish_line = pool_lines;
    g.to = call->buffers[op->i[POOL_ROOM]], g.to_rows = 0;
    g.lines = p.y.kernel, g.height = p.y.out * p.y.kernel;
    g.plane = g.lines * g.width;
    gather_products(&g);
}
