/* The convolutions of docs/arithmetic.md as the page says it, one element at a time, on
 * row-major arrays. Compiled by the tests with -O1 -ffp-contract=off. */
#include <math.h>
#include <stdint.h>

/* Channels of inputs and outputs, groups; then for height and width each: pixels of the
 * inputs, kernel, stride, padding, dilation. */
typedef struct {
    int64_t in, out, groups, image[2], kernel[2], stride[2], padding[2], dilation[2];
} Shape;

static int64_t size_of(const Shape *s, int axis) {
    int64_t reach = s->dilation[axis] * (s->kernel[axis] - 1) + 1;
    return (s->image[axis] + 2 * s->padding[axis] - reach) / s->stride[axis] + 1;
}

/* Where output pixel p reads by tap t, or -1. */
static int64_t source(const Shape *s, int axis, int64_t p, int64_t t) {
    int64_t i = p * s->stride[axis] - s->padding[axis] + t * s->dilation[axis];
    return i >= 0 && i < s->image[axis] ? i : -1;
}

/* A product, term by term. */
typedef struct {
    float total, sum;
    int64_t count;
} Product;

static void end_block(Product *p) {
    p->total = p->count <= 256 ? p->sum : p->total + p->sum;
    p->sum = 0;
}
/* Count one term, and add it if it is there. */
static void count(Product *p, int is_there, float a, float b) {
    if (is_there) p->sum = fmaf(a, b, p->sum);
    if (++p->count % 256 == 0) end_block(p);
}
static float result(Product *p) {
    if (p->count % 256) end_block(p);
    return p->total;
}

static float at(const Shape *s, const float *x, int64_t c, int64_t y, int64_t x_) {
    return x[(c * s->image[0] + y) * s->image[1] + x_];
}

/* y [samples, out, h, w] from x [samples, in, H, W] and w; bias [out] or NULL. */
void conv(const Shape *s, const float *x, const float *w, const float *bias, float *y,
          int64_t samples, int32_t is_relu) {
    int64_t h = size_of(s, 0), width = size_of(s, 1), in = s->in / s->groups;
    int64_t kh = s->kernel[0], kw = s->kernel[1];
    for (int64_t n = 0; n < samples; n++, x += s->in * s->image[0] * s->image[1])
        for (int64_t o = 0; o < s->out; o++)
            for (int64_t p = 0; p < h * width; p++) {
                Product sum = {0};
                for (int64_t t = 0; t < in * kh * kw; t++) {
                    int64_t c = o / (s->out / s->groups) * in + t / (kh * kw);
                    int64_t sy = source(s, 0, p / width, t / kw % kh);
                    int64_t sx = source(s, 1, p % width, t % kw);
                    int is_there = sy >= 0 && sx >= 0;
                    count(&sum, is_there, w[o * in * kh * kw + t],
                          is_there ? at(s, x, c, sy, sx) : 0);
                }
                float v = result(&sum);
                if (bias) v = v + bias[o];
                *y++ = is_relu && v <= 0 ? 0 : v;
            }
}

/* Which output pixel reads input pixel p by tap t, or -1. */
static int64_t reader(const Shape *s, int axis, int64_t p, int64_t t) {
    for (int64_t o = 0; o < size_of(s, axis); o++)
        if (source(s, axis, o, t) == p) return o;
    return -1;
}

/* dx [samples, in, H, W] from dy [samples, out, h, w]; gate, of dx's shape, or NULL. */
void conv_grad_input(const Shape *s, const float *dy, const float *w, const float *gate,
                     float factor, float *dx, int64_t samples) {
    int64_t h = size_of(s, 0), width = size_of(s, 1), in = s->in / s->groups;
    int64_t out = s->out / s->groups, kh = s->kernel[0], kw = s->kernel[1];
    for (int64_t n = 0; n < samples; n++, dy += s->out * h * width)
        for (int64_t c = 0; c < s->in; c++)
            for (int64_t p = 0; p < s->image[0] * s->image[1]; p++) {
                Product sum = {0};
                for (int64_t t = 0; t < out * kh * kw; t++) {
                    int64_t o = c / in * out + t / (kh * kw), tap = t % (kh * kw);
                    int64_t oy = reader(s, 0, p / s->image[1], tap / kw);
                    int64_t ox = reader(s, 1, p % s->image[1], tap % kw);
                    int is_there = oy >= 0 && ox >= 0;
                    count(&sum, is_there, w[(o * in + c % in) * kh * kw + tap],
                          is_there ? dy[(o * h + oy) * width + ox] : 0);
                }
                float v = result(&sum);
                if (gate) v = *gate++ <= 0 ? 0 : v * factor;
                *dx++ = v;
            }
}

static float reduction(const float *x, int64_t n, int64_t step) {
    float sum = 0;
    for (int64_t first = 0; first < n; first += 256) {
        float lanes[16] = {0};
        for (int64_t i = first; i < n && i < first + 256; i++)
            lanes[i % 16] += x[i * step];
        for (int half = 8; half; half /= 2)
            for (int l = 0; l < half; l++) lanes[l] = lanes[l] + lanes[l + half];
        sum += lanes[0];
    }
    return sum;
}

/* One sample's product for weight element `t` of output channel `o`. */
static float of_sample(const Shape *s, const float *dy, const float *x, int64_t o,
                       int64_t t) {
    int64_t h = size_of(s, 0), width = size_of(s, 1), in = s->in / s->groups;
    int64_t kh = s->kernel[0], kw = s->kernel[1];
    int64_t c = o / (s->out / s->groups) * in + t / (kh * kw);
    Product sum = {0};
    for (int64_t p = 0; p < h * width; p++) {
        int64_t sy = source(s, 0, p / width, t / kw % kh);
        int64_t sx = source(s, 1, p % width, t % kw);
        int is_there = sy >= 0 && sx >= 0;
        count(&sum, 1, dy[o * h * width + p], is_there ? at(s, x, c, sy, sx) : 0);
    }
    return result(&sum);
}

/* The sum over pixels, `s = s + x` in blocks of 256. */
static float chain(const float *x, int64_t n) {
    float total = 0;
    for (int64_t first = 0; first < n; first += 256) {
        float sum = 0;
        for (int64_t i = first; i < n && i < first + 256; i++) sum += x[i];
        total = first ? total + sum : sum;
    }
    return total;
}

/* dw and db [out] of one micro-batch. */
void conv_grad_weight(const Shape *s, const float *dy, const float *x, float *dw,
                      float *db, int64_t samples) {
    int64_t plane = size_of(s, 0) * size_of(s, 1);
    int64_t terms = s->in / s->groups * s->kernel[0] * s->kernel[1];
    int64_t inputs = s->in * s->image[0] * s->image[1];
    float sums[samples + 1];
    for (int64_t o = 0; o < s->out; o++) {
        for (int64_t t = 0; t < terms; t++) {
            for (int64_t n = 0; n < samples; n++)
                sums[n] = of_sample(s, dy + n * s->out * plane, x + n * inputs, o, t);
            *dw++ = reduction(sums, samples, 1);
        }
        for (int64_t n = 0; n < samples; n++)
            sums[n] = chain(dy + (n * s->out + o) * plane, plane);
        *db++ = reduction(sums, samples, 1);
    }
}
