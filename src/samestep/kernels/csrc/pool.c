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

/* A window of one plane: numbers of pixels. */
typedef struct {
    int64_t first, rows, columns, row_step, column_step;
} Window;

typedef struct Pool Pool;
struct Pool {
    const Op *op;
    Axis y, x;
    int64_t pixels, out; /* of a plane */
    int is_tiling;       /* each pixel is in one window */
    /* Output pixel `o` of a plane, whose rows begin at these places. */
    void (*window)(const Pool *p, const Window *w, int64_t rows, int64_t columns,
                   int64_t size, float *in, float *out, float *where);
};

INLINE int tiles_axis(const Axis *a) {
    return a->kernel > 0 && a->kernel == a->stride && a->dilation == 1 &&
           a->padding == 0 && a->out * a->stride >= a->size;
}

/* All windows of a plane of one panel. */
INLINE void visit_plane(const Pool *p, float *in, float *out, float *where) {
    for (int64_t y = 0; y < p->y.out; y++) {
        Span down = span_of(&p->y, y);
        for (int64_t x = 0; x < p->x.out; x++) {
            Span across = span_of(&p->x, x);
            Window w = {down.first * p->x.size + across.first, down.taps, across.taps,
                        p->y.dilation * p->x.size, p->x.dilation};
            int64_t size = p->op->i[16];
            if (size <= 0)
                size = size ? down.whole * across.whole : down.taps * across.taps;
            p->window(p, &w, w.rows, w.columns, size, in, out, where);
            out += PANEL;
            if (where) where += PANEL;
        }
    }
}

/* All planes of all panels; a gradient that is a sum begins with zeros. */
INLINE void visit(Pool *p, const Op *op, const Call *call, int64_t in, int64_t out,
                  int64_t where, int is_sum) {
    p->op = op;
    p->y = axis_of(op->i + 4), p->x = axis_of(op->i + 10);
    p->pixels = p->y.size * p->x.size, p->out = p->y.out * p->x.out;
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
        vi at = splat_int((int32_t)w->first);
        UNROLL for (int64_t i = 0; i < rows; i++)
            UNROLL for (int64_t j = 0; j < columns; j++) {
                int64_t pixel = pixel_of(w, i, j);
                vf x = load(in + pixel * PANEL + c);
                vi is_more = (x > most) | (x != x);
                most = select_(is_more, x, most);
                at = (is_more & splat_int((int32_t)pixel)) | (~is_more & at);
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
                store(dx, before + keep(at == (int32_t)pixel, dy));
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

#define WINDOWS_OF(kernel)                                                         \
    static void kernel##_window(const Pool *p, const Window *w, int64_t rows,      \
                                int64_t columns, int64_t size, float *in,          \
                                float *out, float *where) {                        \
        if (rows == 2 && columns == 2)                                             \
            kernel(p, w, 2, 2, size, in, out, where);                              \
        else if (rows == 3 && columns == 3)                                        \
            kernel(p, w, 3, 3, size, in, out, where);                              \
        else                                                                       \
            kernel(p, w, rows, columns, size, in, out, where);                     \
    }
WINDOWS_OF(take_largest)
WINDOWS_OF(give_largest)
WINDOWS_OF(take_mean)
WINDOWS_OF(give_mean)

static void op_max_pool(const Op *op, const Call *call) {
    Pool pool = {.window = take_largest_window};
    visit(&pool, op, call, op->i[0], op->i[1], op->i[2], 0);
}
static void op_max_pool_grad(const Op *op, const Call *call) {
    Pool pool = {.window = give_largest_window};
    visit(&pool, op, call, op->i[1], op->i[0], op->i[2], 1);
}
static void op_mean_pool(const Op *op, const Call *call) {
    Pool pool = {.window = take_mean_window};
    visit(&pool, op, call, op->i[0], op->i[1], -1, 0);
}
static void op_mean_pool_grad(const Op *op, const Call *call) {
    Pool pool = {.window = give_mean_window};
    visit(&pool, op, call, op->i[1], op->i[0], -1, 1);
}
