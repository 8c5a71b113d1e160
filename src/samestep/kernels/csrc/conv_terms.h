/* Convolutions are products whose terms lie in rows that a table lists.
 *
 * The rows of an image [channels, height, width] are its elements in row-major order, so
 * an output pixel is a product of weights with rows that lie at distances which depend
 * only on what the border cuts off. A table of these distances serves all pixels of the
 * same kind, all channels and all samples; nothing is copied. The gradient of the inputs
 * is the same with another table. */

/* One dimension of a convolution. */
typedef struct {
    int64_t in, out; /* pixels of its inputs and outputs */
    int64_t kernel, stride, padding, dilation;
} Side;

typedef struct {
    int64_t in, out; /* channels of one group */
    int64_t groups;
    int64_t taps; /* of the kernel */
    Side y, x;
} Conv;

static Side side_of(int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
    int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
    return (Side){in, room / stride + 1, kernel, stride, padding, dilation};
}

/* The numbers that all operations of convolutions have in the same places. */
static Conv conv_of(const Op *op) {
    const int64_t *i = op->i;
    return (Conv){.in = i[2] / i[4],
                  .out = i[3] / i[4],
                  .groups = i[4],
                  .taps = i[7] * i[8],
                  .y = side_of(i[5], i[7], i[9], i[11], i[13]),
                  .x = side_of(i[6], i[8], i[10], i[12], i[14])};
}
/* What follows them. */
enum { CONV_WEIGHT = 15, CONV_BIAS, CONV_STREAM };
enum { CONV_GATE = 16, CONV_INPUT_BIAS };
enum { CONV_SCRATCH = 17, CONV_WHERE };

/* The taps of a kernel that meet a pixel, in one dimension: they are evenly spaced, and
 * so are the pixels where they meet it. */
typedef struct {
    int64_t first, count, step;  /* of the taps */
    int64_t source, source_step; /* the pixel of the first one */
} TapSpan;

/* Where output pixel `p` and tap `t` read, or -1; with `is_gradient`, which output pixel
 * reads input pixel `p` by tap `t`. */
INLINE int64_t source_of(const Side *s, int is_gradient, int64_t p, int64_t t) {
    if (!is_gradient) {
        int64_t source = p * s->stride - s->padding + t * s->dilation;
        return source < s->in ? source : -1;
    }
    int64_t source = p + s->padding - t * s->dilation;
    if (source < 0 || source % s->stride) return -1;
    return source / s->stride < s->out ? source / s->stride : -1;
}

static TapSpan tap_span(const Side *s, int is_gradient, int64_t p) {
    TapSpan span = {.step = 1};
    for (int64_t t = 0; t < s->kernel; t++) {
        int64_t source = source_of(s, is_gradient, p, t);
        if (source < 0) continue;
        if (span.count == 0) span.first = t, span.source = source;
        if (span.count == 1) {
            span.step = t - span.first;
            span.source_step = source - span.source;
        }
        span.count++;
    }
    return span;
}

/* The end of the pixels from `p` on that differ by nothing but what they read. */
static int64_t end_of_span(const Side *s, int is_gradient, int64_t p,
                           const TapSpan *span) {
    int64_t stride = is_gradient ? 1 : s->stride;
    int64_t last = span->source + (is_gradient ? 0 : span->count - 1) * s->dilation;
    int is_even = span->count == s->kernel && !(is_gradient && s->stride > 1);
    int64_t left = (is_gradient ? s->out : s->in) - 1 - last;
    int64_t end = is_even ? p + left / stride + 1 : p + 1;
    return smaller(end, is_gradient ? s->in : s->out);
}

/* One term: distances from the first source, and from the first weight of a pack. */
typedef struct {
    int32_t source, weight;
} Term;

/* The terms of one kind of pixel in one block of K_BLOCK. */
typedef struct {
    int64_t kind, count;
    Term terms[K_BLOCK];
} Table;

#define TABLES 16

/* A convolution, or the gradient of its inputs. */
typedef struct Gathering Gathering;
typedef struct Block Block;
struct Gathering {
    Conv conv;
    int is_gradient;
    int64_t rows;    /* channels of a group of the result */
    int64_t sources; /* of what is read */
    int64_t height, width;            /* of the result */
    int64_t lines, plane; /* `to` has room for so many of its rows, and their pixels */
    int64_t from_width, from_plane;   /* of what is read */
    int64_t samples, from_rows, to_rows; /* all rows of a panel */
    const float *w;
    const float *from;
    const float *bias, *gate; /* or NULL */
    float *to;
    const Op *op;
    const Call *call;
    /* What is done to a finished line of pixels of a block's channels, or NULL. */
    void (*finish_line)(const Gathering *g, const Block *block, int64_t first,
                        int64_t line);
    const Pool *pool; /* for finish_line */
};

/* Where in a block of terms, and in which group, tiles of rows are computed. */
struct Block {
    int64_t group, k, terms; /* the block: k of `terms` */
    int64_t tile, last, tiles;
    Table tables[TABLES];
    float pack[PACK_TILES * PACKED_TILE + VW] __attribute__((aligned(64)));
};

static void list_terms(const Gathering *g, const Block *block, const TapSpan *y,
                       const TapSpan *x, Table *table) {
    int64_t taps = g->conv.taps, end = block->k + block->terms, n = 0;
    for (int64_t c = block->k / taps; c * taps < end; c++)
        for (int64_t j = 0; j < y->count; j++)
            for (int64_t i = 0; i < x->count; i++) {
                int64_t tap = (y->first + j * y->step) * g->conv.x.kernel + x->first +
                              i * x->step;
                int64_t k = c * taps + tap - block->k;
                if (k < 0 || k >= block->terms) continue;
                int64_t row = c * g->from_plane + j * y->source_step * g->from_width +
                              i * x->source_step;
                table->terms[n++] = (Term){row * PANEL, k * TILE_ROWS};
            }
    table->count = n;
}

/* The table of a pixel, which is often there already. */
static const Table *table_of(const Gathering *g, Block *block, const TapSpan *y,
                             const TapSpan *x) {
    int64_t kinds_x = (g->conv.x.kernel + 1) * (g->conv.x.kernel + 1);
    int64_t kind_y = y->first * (g->conv.y.kernel + 1) + y->count;
    int64_t kind = kind_y * kinds_x + x->first * (g->conv.x.kernel + 1) + x->count;
    int64_t place = 2 * y->first + y->count + 4 * (2 * x->first + x->count);
    Table *table = &block->tables[place % TABLES];
    if (table->kind != kind) {
        list_terms(g, block, y, x, table);
        table->kind = kind;
    }
    return table;
}

/* The gradient's weights [sources, rows, taps] of a block, a tile of rows. */
static void pack_channels(float *pack, const Gathering *g, const Block *block,
                          int64_t row, int64_t rows) {
    int64_t taps = g->conv.taps;
    for (int64_t k = 0; k < block->terms; k++) {
        int64_t c = block->group * g->sources + (block->k + k) / taps;
        const float *w = g->w + (c * g->rows + row) * taps + (block->k + k) % taps;
        for (int64_t r = 0; r < rows; r++) pack[k * TILE_ROWS + r] = w[r * taps];
    }
}

static void pack_tiles(const Gathering *g, Block *block) {
    int64_t step = g->sources * g->conv.taps;
    for (int64_t n = block->tile; n < block->last; n++) {
        int64_t row = first_row(g->rows, block->tiles, n);
        int64_t rows = first_row(g->rows, block->tiles, n + 1) - row;
        float *pack = block->pack + (n - block->tile) * PACKED_TILE;
        if (g->is_gradient)
            pack_channels(pack, g, block, row, rows);
        else
            pack_by_row(pack, g->w + (block->group * g->rows + row) * step + block->k,
                        step, rows, block->terms);
    }
}
