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
#define TERMS_TOGETHER 50   /* of one group of tiles */
#define PIXELS_TOGETHER 64 /* whose gradients stay in the first cache meanwhile */

typedef vf PixelSums[TILE_TERMS][TILE_CHANNELS];

/* One term of a tile: where it reads for output pixel (0, 0), and which output pixels
 * it has: rows [top, bottom), columns [left, right). */
typedef struct {
    int64_t source, top, bottom, left, right;
} Tap;

typedef struct {
    const Op *op;
    const Call *call;
    Conv conv;
    const float *dy, *x; /* panels */
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
    const float *x, *dy; /* the vectors of the first row of the group's channels */
    int64_t plane;
    vf *partial;       /* [TILE_TERMS, TILE_CHANNELS] sums of a block that has begun */
    float *sums;       /* rows of sums: those of one channel follow each other */
    int64_t next;      /* channel, in floats */
} PixelTile;

INLINE void add_pixel(PixelSums sums, const PixelTile *t, const float *const *x,
                      const float *dy, int terms, int channels) {
    vf row[TILE_TERMS];
    UNROLL for (int j = 0; j < terms; j++) row[j] = load(x[j]);
    UNROLL for (int c = 0; c < channels; c++) {
        vf d = load(dy + c * t->plane * PANEL);
        UNROLL for (int j = 0; j < terms; j++)
            sums[j][c] = fma_(d, row[j], sums[j][c]);
    }
}

/* Columns [first, end) of row y. Most have all terms; where one is outside of the image,
 * zeros stand for it. */
INLINE void add_row(PixelSums sums, const PixelTile *t, int64_t y, int64_t first,
                    int64_t end, int terms, int channels) {
    static const float zeros[VW];
    const Side *sy = &t->conv->y, *sx = &t->conv->x;
    int64_t step = sx->stride * PANEL;
    const float *start = t->x + (y * sy->stride * sx->in + first * sx->stride) * PANEL;
    const float *dy = t->dy + (y * sx->out + first) * PANEL, *x[TILE_TERMS];
    int is_inside = y >= t->inside.top && y < t->inside.bottom;
    for (int64_t p = first; p < end; p++, start += step, dy += PANEL) {
        if (is_inside && p >= t->inside.left && p < t->inside.right) {
            UNROLL for (int j = 0; j < terms; j++) x[j] = start + t->source[j];
            for (int64_t last = smaller(end, t->inside.right); p < last; p++) {
                add_pixel(sums, t, x, dy, terms, channels);
                UNROLL for (int j = 0; j < terms; j++) x[j] += step;
                start += step, dy += PANEL;
            }
            if (p == end) return;
        }
        UNROLL for (int j = 0; j < terms; j++) {
            const Tap *tap = &t->taps[j];
            int is_there = (y >= tap->top) & (y < tap->bottom) & (p >= tap->left) &
                           (p < tap->right);
            x[j] = is_there ? start + t->source[j] : zeros;
        }
        add_pixel(sums, t, x, dy, terms, channels);
    }
}

/* Pixels [first, end) of one block. */
INLINE void sum_tile_of_pixels(const PixelTile *t, int64_t first, int64_t end, int terms,
                       int channels) {
    PixelSums sums;
    UNROLL for (int j = 0; j < terms; j++)
        UNROLL for (int c = 0; c < channels; c++)
            sums[j][c] = first % K_BLOCK ? t->partial[j * TILE_CHANNELS + c] : (vf){0};
    int64_t width = t->conv->x.out;
    for (int64_t p = first; p < end;) {
        int64_t y = p / width, column = p % width;
        int64_t last = smaller(width, column + end - p);
        add_row(sums, t, y, column, last, terms, channels);
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

/* Terms [term, last) of `channels` output channels, one vector of samples: the place of
 * a sample is `s`. */
static void sum_group(const ConvGradient *g, const Tap *taps, int64_t group,
                      int64_t channel, int64_t channels, int64_t terms, int64_t s) {
    vf partial[TERMS_TOGETHER * TILE_CHANNELS];
    int64_t panel = s / PANEL * PANEL, tiles = parts_of(terms, TILE_TERMS);
    int64_t in_plane = g->conv.y.in * g->conv.x.in, end;
    PixelTile t = {
        .conv = &g->conv,
        .dy = g->dy + (panel / PANEL * g->dy_rows + channel * g->plane) * PANEL + s % PANEL,
        .x = g->x + (panel / PANEL * g->x_rows + group * g->conv.in * in_plane) * PANEL +
             s % PANEL,
        .plane = g->plane,
        .next = TERMS_TOGETHER * PANEL};
    for (int64_t first = 0; first < g->plane; first = end) {
        end = smaller(first + PIXELS_TOGETHER, g->plane);
        for (int64_t n = 0; n < tiles; n++) {
            int64_t term = first_row(terms, tiles, n);
            int64_t size = first_row(terms, tiles, n + 1) - term;
            take_taps(&t, taps + term, size);
            t.partial = partial + term * TILE_CHANNELS;
            t.sums = g->sums + (panel * CONV_SUMS + term * PANEL) + s % PANEL;
            pixel_tiles[channels - 1][size - 1](&t, first, end);
        }
    }
}

/* The bias's sums of `channels` output channels, one vector of samples. */
static void sum_bias(const ConvGradient *g, int64_t channel, int64_t channels,
                     int64_t s) {
    int64_t panel = s / PANEL;
    for (int64_t c = 0; c < channels; c++) {
        const float *dy =
            g->dy + (panel * g->dy_rows + (channel + c) * g->plane) * PANEL + s % PANEL;
        vf total = {0};
        for (int64_t first = 0; first < g->plane; first += K_BLOCK) {
            vf sum = {0};
            for (int64_t p = first; p < smaller(first + K_BLOCK, g->plane); p++)
                sum += load(dy + p * PANEL);
            total = first ? total + sum : sum;
        }
        store(g->sums + (panel * CONV_SUMS + CONV_SUMS - TILE_CHANNELS + c) * PANEL +
                  s % PANEL,
              total);
    }
}

/* Terms [term, term + terms) of output channels of a group: all samples, all
 * micro-batches. */
static void sum_terms_of_channels(const ConvGradient *g, int64_t group, int64_t channel,
                                  int64_t channels, int64_t term, int64_t terms) {
    const Op *op = g->op;
    int64_t samples = num_samples(g->call), all = g->conv.in * g->conv.taps;
    int has_bias = term == 0 && op->i[CONV_BIAS] >= 0;
    Tap taps[TERMS_TOGETHER];
    for (int64_t n = 0; n < terms; n++) taps[n] = tap_of(&g->conv, term + n);
    for (int64_t s = 0; s < samples; s += VW) {
        sum_group(g, taps, group, channel, channels, terms, s);
        if (has_bias) sum_bias(g, channel, channels, s);
    }
    for (int64_t c = 0; c < channels; c++)
        sum_rows_to_slots(g->call, g->sums + c * TERMS_TOGETHER * PANEL, CONV_SUMS, terms,
                 op->i[CONV_WEIGHT] + (channel + c) * all + term);
    if (has_bias)
        sum_rows_to_slots(g->call, g->sums + (CONV_SUMS - TILE_CHANNELS) * PANEL, CONV_SUMS,
                 channels, op->i[CONV_BIAS] + channel);
}

static void op_conv_grad_weight(const Op *op, const Call *call) {
    ConvGradient g = {.op = op,
                      .call = call,
                      .conv = conv_of(op),
                      .dy = call->buffers[op->i[0]],
                      .x = call->buffers[op->i[1]],
                      .sums = call->buffers[op->i[CONV_SCRATCH]]};
    g.plane = g.conv.y.out * g.conv.x.out;
    g.dy_rows = op->i[3] * g.plane;
    g.x_rows = op->i[2] * g.conv.y.in * g.conv.x.in;
    int64_t all = op->i[CONV_WEIGHT] < 0 ? 0 : g.conv.in * g.conv.taps;
    int64_t tiles = parts_of(g.conv.out, TILE_CHANNELS);
    for (int64_t group = 0; group < g.conv.groups; group++)
        for (int64_t n = 0; n < tiles; n++) {
            int64_t first = first_row(g.conv.out, tiles, n);
            int64_t channels = first_row(g.conv.out, tiles, n + 1) - first;
            for (int64_t term = 0; term == 0 || term < all; term += TERMS_TOGETHER)
                sum_terms_of_channels(&g, group, group * g.conv.out + first, channels,
                                      term, smaller(TERMS_TOGETHER, all - term));
        }
}
