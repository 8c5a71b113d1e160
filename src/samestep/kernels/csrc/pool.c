/* Pooling of images [planes, height, width], whose pixels are rows in row-major order.
 * A window is a loop over rows; lanes are samples. Windows of 2 x 2 and 3 x 3 have
 * loops of their own, unrolled. */

/* One axis of an image, of its windows and of what they become. */
typedef struct {
    int64_t size, out, kernel, stride, padding, dilation;
} Axis;

INLINE Axis axis_of(const int64_t *i) {
    return (Axis){i[0], i[1], i[2], i[3], i[4], i[5]};
}

/* Where a window lies along one axis: `taps` places within the image, from `first` on,
 * `dilation` apart. `whole` counts those in the padding, too. */
typedef struct {
    int64_t first, taps, whole;
} Span;

/* A division costs as much as a small window. */
INLINE int64_t steps_of(int64_t size, int64_t step) {
    return step == 1 ? size : parts_of(size, step);
}

/* A kernel of size 0 is adaptive: `out` windows share the axis. */
INLINE Span span_of(const Axis *a, int64_t n) {
    if (a->kernel == 0) {
        int64_t first = n * a->size / a->out;
        int64_t taps = parts_of((n + 1) * a->size, a->out) - first;
        return (Span){first, taps, taps};
    }
    int64_t start = n * a->stride - a->padding, d = a->dilation;
    int64_t skipped = start < 0 ? steps_of(-start, d) : 0;
    int64_t end = smaller(steps_of(a->size - start, d), a->kernel);
    return (Span){start + skipped * d, end - skipped,
                  smaller(a->kernel, a->size + a->padding - start)};
}

/* A window of one plane: numbers of pixels, the first of which is `origin`. */
typedef struct {
    int64_t first, rows, columns, row_step, column_step, origin;
} Window;

typedef struct Pool Pool;
struct Pool {
    const Op *op;
    Axis y, x;
    int64_t pixels, out; /* of a plane */
    int64_t divisor;     /* of means: see OP_MEAN_POOL */
    int is_tiling;       /* each pixel is in one window */
    /* A row of windows; its first pixels are in row `down.first` of `in`, which begins
     * with pixel `origin` of a plane. */
    void (*row)(const Pool *p, Span down, int64_t origin, float *in, float *out,
                float *where);
};
/* What is done to a window, whose sums are over `size` pixels. */
typedef void (*OfWindow)(const Pool *p, const Window *w, int64_t rows, int64_t columns,
                         int64_t size, float *in, float *out, float *where);

INLINE int tiles_axis(const Axis *a) {
    return a->kernel > 0 && a->kernel == a->stride && a->dilation == 1 &&
           a->padding == 0 && a->out * a->stride >= a->size;
}

/* Whether no window reaches beyond the image. */
INLINE int is_even(const Axis *a) {
    return a->kernel > 0 && a->padding == 0 &&
           (a->out - 1) * a->stride + (a->kernel - 1) * a->dilation < a->size;
}

/* A row of windows, of `rows` x `columns` each where these are not 0. */
INLINE void visit_row(const Pool *p, Span down, int64_t origin, float *in, float *out,
                      float *where, OfWindow of_window, int rows, int columns) {
    for (int64_t x = 0; x < p->x.out; x++, out += PANEL) {
        Span across = {x * p->x.stride, columns, columns};
        if (!columns) across = span_of(&p->x, x);
        Window w = {down.first * p->x.size + across.first,
                    rows ? rows : down.taps,
                    across.taps,
                    p->y.dilation * p->x.size,
                    p->x.dilation,
                    origin};
        int64_t size = p->divisor;
        if (size <= 0) size = size ? down.whole * across.whole : w.rows * w.columns;
        of_window(p, &w, w.rows, w.columns, size, in, out, where);
        if (where) where += PANEL;
    }
}

/* All windows of a plane of one panel. */
INLINE void visit_plane(const Pool *p, float *in, float *out, float *where) {
    for (int64_t y = 0; y < p->y.out; y++) {
        int64_t row = y * p->x.out * PANEL;
        p->row(p, span_of(&p->y, y), 0, in, out + row, where ? where + row : NULL);
    }
}

/* All planes of all panels; a gradient that is a sum begins with zeros. */
INLINE void visit(Pool *p, const Op *op, const Call *call, int64_t in, int64_t out,
                  int64_t where, int is_sum) {
    p->op = op;
    p->y = axis_of(op->i + 4), p->x = axis_of(op->i + 10);
    p->pixels = p->y.size * p->x.size, p->out = p->y.out * p->x.out;
    p->divisor = op->i[16];
    p->is_tiling = tiles_axis(&p->y) && tiles_axis(&p->x);
    int64_t planes = op->i[3] * parts_of(num_samples(call), PANEL);
    for (int64_t n = 0; n < planes; n++) {
        float *image = call->buffers[in] + n * p->pixels * PANEL;
        int64_t place = n * p->out * PANEL;
        if (is_sum && !p->is_tiling)
            memset(image, 0, (size_t)(p->pixels * PANEL) * sizeof(float));
        visit_plane(p, image, call->buffers[out] + place,
                    where < 0 ? NULL : call->buffers[where] + place);
    }
}

INLINE int64_t pixel_of(const Window *w, int64_t row, int64_t column) {
    return w->first + row * w->row_step + column * w->column_step;
}

/* The largest value and its pixel; the first of equal ones, the last of NaNs. With
 * ReLU, what it cuts off has pixel -1. */
INLINE void take_largest(const Pool *p, const Window *w, int64_t rows, int64_t columns,
                         int64_t size, float *in, float *out, float *where) {
    (void)size;
    for (int64_t c = 0; c < PANEL; c += VW) {
        vf most = load(in + w->first * PANEL + c);
        vi at = splat_int((int32_t)(w->origin + w->first));
        UNROLL for (int64_t i = 0; i < rows; i++)
            UNROLL for (int64_t j = 0; j < columns; j++) {
                int64_t pixel = pixel_of(w, i, j);
                vf x = load(in + pixel * PANEL + c);
                vi is_more = (x > most) | (x != x);
                most = select_(is_more, x, most);
                vi own = splat_int((int32_t)(w->origin + pixel));
                at = (is_more & own) | (~is_more & at);
            }
        if (p->op->flags & OP_RELU) at |= most <= 0, most = relu(most);
        store(out + c, most);
        if (where) store(where + c, (vf)at);
    }
}
INLINE void give_largest(const Pool *p, const Window *w, int64_t rows, int64_t columns,
                         int64_t size, float *in, float *out, float *where) {
    (void)size;
    for (int64_t c = 0; c < PANEL; c += VW) {
        vf dy = load(out + c);
        vi at = (vi)load(where + c);
        UNROLL for (int64_t i = 0; i < rows; i++)
            UNROLL for (int64_t j = 0; j < columns; j++) {
                int64_t pixel = pixel_of(w, i, j);
                float *dx = in + pixel * PANEL + c;
                vf before = p->is_tiling ? (vf){0} : load(dx);
                store(dx, before + keep(at == (int32_t)(w->origin + pixel), dy));
            }
    }
}

/* The chain of a window's values, in blocks of K_BLOCK, over their number. */
INLINE void take_mean(const Pool *p, const Window *w, int64_t rows, int64_t columns,
                      int64_t size, float *in, float *out, float *where) {
    (void)p, (void)where;
    for (int64_t c = 0; c < PANEL; c += VW) {
        vf sum = {0}, block = {0};
        int64_t n = 0;
        UNROLL for (int64_t i = 0; i < rows; i++)
            UNROLL for (int64_t j = 0; j < columns; j++) {
                if (n++ == K_BLOCK) sum += block, block = (vf){0}, n = 1;
                block += load(in + pixel_of(w, i, j) * PANEL + c);
            }
        store(out + c, (sum + block) / (float)size);
    }
}
INLINE void give_mean(const Pool *p, const Window *w, int64_t rows, int64_t columns,
                      int64_t size, float *in, float *out, float *where) {
    (void)where;
    for (int64_t c = 0; c < PANEL; c += VW) {
        vf share = load(out + c) / (float)size;
        UNROLL for (int64_t i = 0; i < rows; i++)
            UNROLL for (int64_t j = 0; j < columns; j++) {
                float *dx = in + pixel_of(w, i, j) * PANEL + c;
                store(dx, (p->is_tiling ? (vf){0} : load(dx)) + share);
            }
    }
}

#define ROW_OF(of_window)                                                            \
    static void of_window##_row(const Pool *p, Span down, int64_t origin, float *in, \
                             float *out, float *where) {                             \
        int64_t taps = is_even(&p->x) ? p->x.kernel : 0;                             \
        if (down.taps == 2 && taps == 2)                                             \
            visit_row(p, down, origin, in, out, where, of_window, 2, 2);             \
        else if (down.taps == 3 && taps == 3)                                        \
            visit_row(p, down, origin, in, out, where, of_window, 3, 3);             \
        else                                                                         \
            visit_row(p, down, origin, in, out, where, of_window, 0, 0);             \
    }
ROW_OF(take_largest)
ROW_OF(give_largest)
ROW_OF(take_mean)
ROW_OF(give_mean)

static void op_max_pool(const Op *op, const Call *call) {
    Pool pool = {.row = take_largest_row};
    visit(&pool, op, call, op->i[0], op->i[1], op->i[2], 0);
}
static void op_max_pool_grad(const Op *op, const Call *call) {
    Pool pool = {.row = give_largest_row};
    visit(&pool, op, call, op->i[1], op->i[0], op->i[2], 1);
}
static void op_mean_pool(const Op *op, const Call *call) {
    Pool pool = {.row = take_mean_row};
    visit(&pool, op, call, op->i[0], op->i[1], -1, 0);
}
static void op_mean_pool_grad(const Op *op, const Call *call) {
    Pool pool = {.row = give_mean_row};
    visit(&pool, op, call, op->i[1], op->i[0], -1, 1);
}
