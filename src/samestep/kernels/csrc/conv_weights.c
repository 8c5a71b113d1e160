/* Gradients of a convolution's weight and bias: each sample's sums over the pixels, then
 * those over the samples of every micro-batch, up the tree into the slots.
 *
 * Lanes are samples. A tile of sums belongs to a few output channels and a few terms
 * (input channel and tap), so that a pixel's rows of both are multiplied with each
 * other. Sums of a group of tiles lie in a buffer, [CONV_SUMS, samples] by feature,
 * until all samples are there. */

#if VW == 16 || defined(__aarch64__)
#define TILE_TERMS 5 /* 25 sums, 5 inputs and a gradient: 31 of 32 registers */
#define TILE_CHANNELS 5
#elif VW == 8
#define TILE_TERMS 3 /* 12, 3 and one: 16 of 16 */
#define TILE_CHANNELS 4
#else
#define TILE_TERMS 1
#define TILE_CHANNELS 2
#endif
#define TERMS_TOGETHER 100  /* of one group of tiles */
#define PIXELS_TOGETHER 64 /* whose gradients stay in the first cache meanwhile */

typedef vf PixelSums[TILE_TERMS][TILE_CHANNELS];

/* One term of a tile: where it reads for output pixel (0, 0), and which output pixels
 * it has: rows [top, bottom), columns [left, right). */
typedef struct {
    int64_t source, top, bottom, left, right;
} Tap;

/* How a convolution's results were pooled, by windows that follow each other. */
typedef struct {
    int64_t height, width; /* of a window */
    int64_t rows, columns; /* of windows */
} Unpooling;

typedef struct {
    const Op *op;
    const Call *call;
    Conv conv;
    const float *dy, *x; /* panels */
    const float *where;  /* the pixels that dy belongs to, or NULL: all */
    Unpooling pool;
    int64_t dy_plane;    /* rows of a channel of dy */
    float *sums;         /* panels [CONV_SUMS, samples] */
    int64_t plane;       /* pixels of the outputs */
    int64_t dy_rows, x_rows;
} ConvGradient;

/* The first position whose source is inside, and the first after it whose is not. */
static void bounds_of(const Side *s, int64_t tap, int64_t *first, int64_t *end) {
    int64_t before = s->padding - tap * s->dilation;
    *first = before > 0 ? parts_of(before, s->stride) : 0;
    *end = before + s->in <= 0 ? 0 : parts_of(before + s->in, s->stride);
    *end = smaller(*end, s->out);
    *first = smaller(*first, *end);
}

static Tap tap_of(const Conv *conv, int64_t term) {
    int64_t tap = term % conv->taps, plane = conv->y.in * conv->x.in;
    int64_t ty = tap / conv->x.kernel, tx = tap % conv->x.kernel;
    Tap t = {.source = term / conv->taps * plane +
                       (ty * conv->y.dilation - conv->y.padding) * conv->x.in +
                       tx * conv->x.dilation - conv->x.padding};
    bounds_of(&conv->y, ty, &t.top, &t.bottom);
    bounds_of(&conv->x, tx, &t.left, &t.right);
    return t;
}

/* One vector of samples and one tile. */
typedef struct {
    const Conv *conv;
    const Tap *taps;
    Tap inside; /* the pixels that all terms have */
    int64_t source[TILE_TERMS]; /* of the terms, in floats */
    const float *x;  /* the vector of the first row of the group's channels */
    const float *dy; /* [pixels, TILE_CHANNELS] vectors */
    int64_t plane;     /* pixels of the outputs */
    vf *partial;       /* [TILE_TERMS, TILE_CHANNELS] sums of a block that has begun */
    float *sums;       /* rows of sums: those of one channel follow each other */
    int64_t next;      /* channel, in floats */
} PixelTile;

INLINE void add_pixel(PixelSums sums, const float *const *x, const float *dy, int terms,
                      int channels) {
    vf row[TILE_TERMS];
    UNROLL for (int j = 0; j < terms; j++) row[j] = load(x[j]);
    UNROLL for (int c = 0; c < channels; c++) {
        vf d = load(dy + c * VW);
        UNROLL for (int j = 0; j < terms; j++)
            sums[j][c] = fma_(d, row[j], sums[j][c]);
    }
}

/* Columns [first, end) of row y. Most have all terms; where one is outside of the image,
 * zeros stand for it. */
INLINE void add_row(PixelSums sums, const PixelTile *t, const float *dy, int64_t y,
                    int64_t first, int64_t end, int terms, int channels) {
    static const float zeros[VW];
    const Side *sy = &t->conv->y, *sx = &t->conv->x;
    int64_t step = sx->stride * PANEL;
    const float *start = t->x + (y * sy->stride * sx->in + first * sx->stride) * PANEL;
    const float *x[TILE_TERMS];
    int is_inside = y >= t->inside.top && y < t->inside.bottom;
    for (int64_t p = first; p < end; p++, start += step) {
        if (is_inside && p >= t->inside.left && p < t->inside.right) {
            UNROLL for (int j = 0; j < terms; j++) x[j] = start + t->source[j];
            for (int64_t last = smaller(end, t->inside.right); p < last; p++) {
                add_pixel(sums, x, dy, terms, channels);
                UNROLL for (int j = 0; j < terms; j++) x[j] += step;
                start += step, dy += TILE_CHANNELS * VW;
            }
            if (p == end) return;
        }
        UNROLL for (int j = 0; j < terms; j++) {
            const Tap *tap = &t->taps[j];
            int is_there = (y >= tap->top) & (y < tap->bottom) & (p >= tap->left) &
                           (p < tap->right);
            x[j] = is_there ? start + t->source[j] : zeros;
        }
        add_pixel(sums, x, dy, terms, channels);
        dy += TILE_CHANNELS * VW;
    }
}

/* Pixels [first, end) of one block. */
INLINE void sum_tile_of_pixels(const PixelTile *t, int64_t first, int64_t end, int terms,
                       int channels) {
    PixelSums sums;
    UNROLL for (int j = 0; j < terms; j++)
        UNROLL for (int c = 0; c < channels; c++)
            sums[j][c] = first % K_BLOCK ? t->partial[j * TILE_CHANNELS + c] : (vf){0};
    int64_t width = t->conv->x.out, y = first / width, column = first % width;
    for (int64_t p = first; p < end; y++, column = 0) {
        int64_t last = smaller(width, column + end - p);
        const float *dy = t->dy + (p - first) * TILE_CHANNELS * VW;
        add_row(sums, t, dy, y, column, last, terms, channels);
        p += last - column;
    }
    int is_block = end % K_BLOCK == 0 || end == t->plane;
    UNROLL for (int j = 0; j < terms; j++)
        UNROLL for (int c = 0; c < channels; c++) {
            float *to = t->sums + c * t->next + j * PANEL;
            if (!is_block)
                t->partial[j * TILE_CHANNELS + c] = sums[j][c];
            else
                store(to, end > K_BLOCK ? load(to) + sums[j][c] : sums[j][c]);
        }
}

typedef void (*SumPixels)(const PixelTile *, int64_t, int64_t);
#define SUM_TILE_OF_PIXELS(terms, channels)                                           \
    static void pixels_##terms##x##channels(const PixelTile *t, int64_t first, \
                                            int64_t end) {                     \
        sum_tile_of_pixels(t, first, end, terms, channels);                            \
    }
#define NAME_PIXELS(terms, channels) pixels_##terms##x##channels,
#if TILE_TERMS == 5
#define EACH_TERMS(X, c) X(1, c) X(2, c) X(3, c) X(4, c) X(5, c)
#define EACH_CHANNELS(list, X) list(X, 1) list(X, 2) list(X, 3) list(X, 4) list(X, 5)
#elif TILE_TERMS == 3
#define EACH_TERMS(X, c) X(1, c) X(2, c) X(3, c)
#define EACH_CHANNELS(list, X) list(X, 1) list(X, 2) list(X, 3) list(X, 4)
#else
#define EACH_TERMS(X, c) X(1, c)
#define EACH_CHANNELS(list, X) list(X, 1) list(X, 2)
#endif
#define LIST_TERMS(X, c) EACH_TERMS(X, c)
#define LIST_TERMS_BRACED(X, c) {EACH_TERMS(X, c)},
EACH_CHANNELS(LIST_TERMS, SUM_TILE_OF_PIXELS)
static const SumPixels pixel_tiles[TILE_CHANNELS][TILE_TERMS] = {
    EACH_CHANNELS(LIST_TERMS_BRACED, NAME_PIXELS)};

static void take_taps(PixelTile *t, const Tap *taps, int64_t terms) {
    t->taps = taps;
    t->inside = taps[0];
    for (int64_t j = 0; j < terms; j++) {
        t->source[j] = taps[j].source * PANEL;
        if (taps[j].top > t->inside.top) t->inside.top = taps[j].top;
        if (taps[j].left > t->inside.left) t->inside.left = taps[j].left;
        t->inside.bottom = smaller(taps[j].bottom, t->inside.bottom);
        t->inside.right = smaller(taps[j].right, t->inside.right);
    }
}

/* What one group of tiles sums: `channels` output channels from `channel` on, and terms
 * of the same group of channels. */
typedef struct {
    const ConvGradient *g;
    int64_t group, channel, channels;
    int64_t term, terms;
    int has_bias;
    Tap taps[TERMS_TOGETHER];
} SumGroup;

/* Copy the gradients of pixels [first, end), one vector of samples and one channel, to
 * where the channels' lie side by side. `from` is the channel's first row. Returns the
 * bias's sum with them. */
INLINE vf copy_gradients(const float *from, int64_t first, int64_t end, float *to,
                         vf sum) {
    for (int64_t p = first; p < end; p++, to += TILE_CHANNELS * VW) {
        vf dy = load(from + p * PANEL);
        sum += dy;
        store(to, dy);
    }
    return sum;
}

/* The same of pixels that were pooled: a window's gradient belongs to one of them. */
INLINE vf copy_pooled(const Unpooling *u, int64_t width, const float *from,
                      const float *where, int64_t first, int64_t end, float *to,
                      vf sum) {
    int64_t y = first / width, x = first % width, left = u->width - x % u->width;
    int64_t window = y / u->height * u->columns + x / u->width;
    for (int64_t p = first; p < end; p++, to += TILE_CHANNELS * VW) {
        vf dy = {0};
        if (y < u->rows * u->height && x < u->columns * u->width) {
            vi at = (vi)load(where + window * PANEL);
            dy += keep(at == (int32_t)p, load(from + window * PANEL));
        }
        sum += dy;
        store(to, dy);
        x++;
        if (--left == 0) left = u->width, window++;
        if (x < width) continue;
        y++, x = 0, left = u->width;
        window = y / u->height * u->columns;
    }
    return sum;
}

/* Those of all channels of a group; a block of the bias's sums may begin here. */
static void take_gradients(const SumGroup *group, int64_t s, int64_t first, int64_t end,
                           float *dy, vf *bias) {
    const ConvGradient *g = group->g;
    int64_t row = s / PANEL * g->dy_rows + group->channel * g->dy_plane;
    for (int64_t c = 0; c < group->channels; c++, row += g->dy_plane) {
        const float *from = g->dy + row * PANEL + s % PANEL;
        vf sum = first % K_BLOCK ? bias[c] : (vf){0};
        float *to = dy + c * VW;
        if (g->where)
            bias[c] = copy_pooled(&g->pool, g->conv.x.out, from,
                                  g->where + row * PANEL + s % PANEL, first, end, to,
                                  sum);
        else
            bias[c] = copy_gradients(from, first, end, to, sum);
    }
}

/* Where the sums of a row of the buffer lie. */
INLINE float *sums_at(const ConvGradient *g, int64_t row, int64_t s) {
    return g->sums + (s / PANEL * CONV_SUMS + row) * PANEL + s % PANEL;
}

/* One vector of samples, beginning with `s`. */
static void sum_group(const SumGroup *group, int64_t s) {
    const ConvGradient *g = group->g;
    vf partial[TERMS_TOGETHER * TILE_CHANNELS], bias[TILE_CHANNELS];
    float dy[PIXELS_TOGETHER * TILE_CHANNELS * VW] __attribute__((aligned(64)));
    int64_t tiles = parts_of(group->terms, TILE_TERMS), end;
    int64_t row = group->group * g->conv.in * g->conv.y.in * g->conv.x.in;
    PixelTile t = {.conv = &g->conv,
                   .dy = dy,
                   .x = g->x + (s / PANEL * g->x_rows + row) * PANEL + s % PANEL,
                   .plane = g->plane,
                   .next = TERMS_TOGETHER * PANEL};
    for (int64_t first = 0; first < g->plane; first = end) {
        end = smaller(first + PIXELS_TOGETHER, g->plane);
        take_gradients(group, s, first, end, dy, bias);
        for (int64_t n = 0; n < tiles; n++) {
            int64_t term = first_row(group->terms, tiles, n);
            int64_t size = first_row(group->terms, tiles, n + 1) - term;
            take_taps(&t, group->taps + term, size);
            t.partial = partial + term * TILE_CHANNELS;
            t.sums = sums_at(g, term, s);
            pixel_tiles[group->channels - 1][size - 1](&t, first, end);
        }
        if (!group->has_bias || (end % K_BLOCK && end < g->plane)) continue;
        for (int64_t c = 0; c < group->channels; c++) {
            float *to = sums_at(g, CONV_SUMS - TILE_CHANNELS + c, s);
            store(to, end > K_BLOCK ? load(to) + bias[c] : bias[c]);
        }
    }
}

/* All samples, all micro-batches. */
static void sum_whole_group(const SumGroup *group) {
    const ConvGradient *g = group->g;
    const int64_t *i = g->op->i;
    for (int64_t s = 0; s < num_samples(g->call); s += VW) sum_group(group, s);
    for (int64_t c = 0; c < group->channels; c++) {
        int64_t place = (group->channel + c) * g->conv.in * g->conv.taps + group->term;
        sum_rows_to_slots(g->call, sums_at(g, c * TERMS_TOGETHER, 0), CONV_SUMS,
                          group->terms, i[CONV_WEIGHT] + place);
    }
    if (group->has_bias)
        sum_rows_to_slots(g->call, sums_at(g, CONV_SUMS - TILE_CHANNELS, 0), CONV_SUMS,
                          group->channels, i[CONV_BIAS] + group->channel);
}

static void op_conv_grad_weight(const Op *op, const Call *call) {
    ConvGradient g = {.op = op,
                      .call = call,
                      .conv = conv_of(op),
                      .dy = call->buffers[op->i[0]],
                      .x = call->buffers[op->i[1]],
                      .sums = call->buffers[op->i[CONV_SCRATCH]]};
    g.plane = g.conv.y.out * g.conv.x.out;
    g.dy_plane = g.plane;
    if (op->i[CONV_WHERE] >= 0) {
        const int64_t *sizes = op->i + CONV_WHERE + 1;
        g.where = call->buffers[op->i[CONV_WHERE]];
        g.pool = (Unpooling){sizes[0], sizes[1], sizes[2], sizes[3]};
        g.dy_plane = sizes[2] * sizes[3];
    }
    g.dy_rows = op->i[3] * g.dy_plane;
    g.x_rows = op->i[2] * g.conv.y.in * g.conv.x.in;
    int64_t all = op->i[CONV_WEIGHT] < 0 ? 0 : g.conv.in * g.conv.taps;
    int64_t tiles = parts_of(g.conv.out, TILE_CHANNELS);
    for (int64_t n = 0; n < g.conv.groups * tiles; n++) {
        int64_t first = first_row(g.conv.out, tiles, n % tiles);
        SumGroup group = {.g = &g, .group = n / tiles};
        group.channel = group.group * g.conv.out + first;
        group.channels = first_row(g.conv.out, tiles, n % tiles + 1) - first;
        int64_t parts = all ? parts_of(all, TERMS_TOGETHER) : 1;
        for (int64_t part = 0; part < parts; part++) {
            int64_t term = first_row(all, parts, part);
            group.term = term, group.terms = first_row(all, parts, part + 1) - term;
            group.has_bias = term == 0 && op->i[CONV_BIAS] >= 0;
            for (int64_t k = 0; k < group.terms; k++)
                group.taps[k] = tap_of(&g.conv, term + k);
            sum_whole_group(&group);
        }
    }
}
