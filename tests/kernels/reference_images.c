/* docs/arithmetic.md for images: pooling and BatchNorm over pixels. */
#include "reference_pointwise.c"

enum { Y = 4, X = 10 }; /* where the numbers of an axis begin */

/* The pixels of one axis that window o has, in order; returns how many. `whole` is
 * their number with those in the padding. */
static int64_t window(In op, int axis, int64_t o, int64_t *pixels, int64_t *whole) {
    const int64_t *n = op->i + axis;
    int64_t size = n[0], out = n[1], kernel = n[2], count = 0;
    int64_t start = o * n[3] - n[4];
    if (kernel == 0) {
        start = o * size / out;
        int64_t end = ((o + 1) * size + out - 1) / out;
        for (int64_t p = start; p < end; p++) pixels[count++] = p;
        *whole = count;
        return count;
    }
    *whole = 0;
    for (int64_t k = 0; k < kernel; k++) {
        int64_t p = start + k * n[5];
        if (p < size + n[4]) ++*whole;
        if (p >= 0 && p < size) pixels[count++] = p;
    }
    return count;
}

static float product(const float *a, const float *b, int64_t n) {
    float sum = 0;
    for (int64_t first = 0; first < n; first += 256) {
        float block = 0;
        for (int64_t i = first; i < n && i < first + 256; i++)
            block = fmaf(a[i], b[i], block);
        sum += block;
    }
    return sum;
}

static int32_t *pixel_of(float *place) { return (int32_t *)place; }

/* One window of one sample; `x` and `y` are planes' first rows among the features. */
static void pool_window(In op, At call, int64_t s, int64_t plane, int64_t oy,
                        int64_t ox) {
    int64_t height = op->i[Y], width = op->i[X];
    int64_t out = op->i[Y + 1] * op->i[X + 1], all, rows, columns;
    int64_t features = op->i[3] * height * width, outs = op->i[3] * out;
    int64_t ys[height], xs[width], o = plane * out + oy * op->i[X + 1] + ox;
    int64_t num_y = window(op, Y, oy, ys, &rows), count = op->i[16];
    int64_t num_x = window(op, X, ox, xs, &columns);
    if (count <= 0) count = count ? rows * columns : num_y * num_x;
    float values[num_y * num_x];
    int64_t first = plane * height * width, pixels[num_y * num_x], most = 0;
    int is_grad = op->kind == OP_MAX_POOL_GRAD || op->kind == OP_MEAN_POOL_GRAD;
    all = 0;
    for (int64_t i = 0; i < num_y; i++)
        for (int64_t j = 0; j < num_x; j++) pixels[all++] = ys[i] * width + xs[j];
    if (is_grad) {
        float dy = *by_feature(call, op->i[0], outs, o, s);
        for (int64_t i = 0; i < all; i++) {
            float *dx = by_feature(call, op->i[1], features, first + pixels[i], s);
            if (op->kind == OP_MEAN_POOL_GRAD) *dx += dy / (float)count;
            if (op->kind == OP_MAX_POOL_GRAD &&
                *pixel_of(by_feature(call, op->i[2], outs, o, s)) == pixels[i])
                *dx += dy;
        }
        return;
    }
    for (int64_t i = 0; i < all; i++) {
        values[i] = *by_feature(call, op->i[0], features, first + pixels[i], s);
        if (isnan(values[i]) || values[i] > values[most]) most = i;
    }
    float *y = by_feature(call, op->i[1], outs, o, s);
    if (op->kind == OP_MEAN_POOL) {
        *y = chain(values, all) / (float)count;
        return;
    }
    int is_cut = op->flags & OP_RELU && values[most] <= 0;
    *y = is_cut ? 0 : values[most];
    if (op->i[2] >= 0)
        *pixel_of(by_feature(call, op->i[2], outs, o, s)) = is_cut ? -1 : pixels[most];
}

static void pool(In op, At call) {
    int64_t pixels = op->i[Y] * op->i[X], features = op->i[3] * pixels;
    int is_grad = op->kind == OP_MAX_POOL_GRAD || op->kind == OP_MEAN_POOL_GRAD;
    for (int64_t s = 0; s < samples_of(call); s++) {
        for (int64_t f = 0; f < features && is_grad; f++)
            *by_feature(call, op->i[1], features, f, s) = 0;
        for (int64_t plane = 0; plane < op->i[3]; plane++)
            for (int64_t y = 0; y < op->i[Y + 1]; y++)
                for (int64_t x = 0; x < op->i[X + 1]; x++)
                    pool_window(op, call, s, plane, y, x);
    }
}

/* BatchNorm of channel c of the samples of micro-batch m. */
static float parameter(At call, int64_t place, int64_t c, float otherwise) {
    return place < 0 ? otherwise : call->parameters[place + c];
}
static void norm_channel(In op, At call, int64_t c) {
    int64_t channels = op->i[4], P = op->i[5], count = call->micro_batches;
    int64_t n = channels * P;
    int is_eval = op->flags & OP_EVAL;
    float moved[2][count];
    for (int64_t m = 0; m < count; m++) {
        int64_t start = call->starts[m], b = call->starts[m + 1] - start;
        float x[b + 1][P], d[b + 1][P], sums[b + 1], squares[b + 1];
        for (int64_t s = 0; s < b; s++) {
            for (int64_t p = 0; p < P; p++)
                x[s][p] = *by_feature(call, op->i[0], n, c * P + p, start + s);
            sums[s] = chain(x[s], P);
        }
        float mean = is_eval ? call->running[op->i[8] + c]
                             : reduction(sums, b) / (float)(b * P);
        for (int64_t s = 0; s < b; s++) {
            for (int64_t p = 0; p < P; p++) d[s][p] = x[s][p] - mean;
            squares[s] = product(d[s], d[s], P);
        }
        float variance = is_eval ? call->running[op->i[9] + c]
                                 : reduction(squares, b) / (float)(b * P);
        float inverse = 1 / sqrtf(variance + op->f[0]);
        for (int64_t s = 0; s < b; s++) {
            if (!is_eval) {
                *by_feature(call, op->i[2], channels, c, start + s) = mean;
                *by_feature(call, op->i[3], channels, c, start + s) = inverse;
            }
            for (int64_t p = 0; p < P; p++) {
                float y = fmaf(d[s][p] * inverse, parameter(call, op->i[6], c, 1),
                               parameter(call, op->i[7], c, 0));
                int64_t f = c * P + p;
                if (op->i[10] >= 0) y += *by_feature(call, op->i[10], n, f, start + s);
                if (op->flags & OP_RELU && y <= 0) y = 0;
                *by_feature(call, op->i[1], n, f, start + s) = y;
            }
        }
        float ratio = (float)((double)(b * P) / (double)(b * P - 1));
        float new[2] = {mean, b * P > 1 ? variance * ratio : 0};
        for (int k = 0; k < 2 && op->i[8] >= 0; k++) {
            float old = call->running[op->i[8 + k] + c];
            moved[k][m] = b ? fmaf(op->f[1], new[k] - old, old) : old;
        }
    }
    for (int k = 0; k < 2 && op->i[8] >= 0 && !is_eval; k++)
        into_slots(call, call->tail + op->i[8 + k] + c, moved[k]);
}

static void norm_channel_grad(In op, At call, int64_t c) {
    int64_t channels = op->i[7], P = op->i[8], count = call->micro_batches;
    int64_t n = channels * P;
    float weights[count], biases[count], weight = parameter(call, op->i[9], c, 1);
    for (int64_t m = 0; m < count; m++) {
        int64_t start = call->starts[m], b = call->starts[m + 1] - start;
        float g[b + 1][P], z[b + 1][P], sums[b + 1], products[b + 1], inverses[b + 1];
        for (int64_t s = 0; s < b; s++) {
            float mean = *by_feature(call, op->i[4], channels, c, start + s);
            float inverse = *by_feature(call, op->i[5], channels, c, start + s);
            inverses[s] = inverse;
            for (int64_t p = 0; p < P; p++) {
                int64_t f = c * P + p;
                float d = *by_feature(call, op->i[3], n, f, start + s) - mean;
                z[s][p] = d * inverse;
                g[s][p] = *by_feature(call, op->i[0], n, f, start + s);
                float y = fmaf(z[s][p], weight, parameter(call, op->i[10], c, 0));
                if (op->i[2] >= 0) y = *by_feature(call, op->i[2], n, f, start + s);
                if ((op->i[2] >= 0 || op->flags & OP_RELU) && y <= 0) g[s][p] = 0;
            }
            sums[s] = chain(g[s], P), products[s] = product(g[s], z[s], P);
        }
        biases[m] = reduction(sums, b), weights[m] = reduction(products, b);
        float values = (float)(b * P);
        for (int64_t s = 0; s < b; s++)
            for (int64_t p = 0; p < P; p++)
                *by_feature(call, op->i[1], n, c * P + p, start + s) =
                    (weight * inverses[s]) *
                    ((g[s][p] - biases[m] / values) - z[s][p] * (weights[m] / values));
    }
    if (op->i[11] >= 0) into_slots(call, op->i[11] + c, weights);
    if (op->i[12] >= 0) into_slots(call, op->i[12] + c, biases);
}

void reference_images(In op, At call) {
    switch (op->kind) {
        case OP_BATCH_NORM_2D:
            for (int64_t c = 0; c < op->i[4]; c++) norm_channel(op, call, c);
            break;
        case OP_BATCH_NORM_2D_GRAD:
            for (int64_t c = 0; c < op->i[7]; c++) norm_channel_grad(op, call, c);
            break;
        default: pool(op, call);
    }
}
