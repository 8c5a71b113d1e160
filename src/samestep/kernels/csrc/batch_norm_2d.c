/* BatchNorm of images [channels, pixels]: statistics over a micro-batch's samples and
 * all pixels. A sample's sum over the pixels is a chain in its own lane, so whole
 * panels are summed whatever micro-batches they belong to; reductions over the samples
 * follow. Statistics, too, have a lane for each sample: means and inverse deviations
 * are matrices by feature.
 *
 * What was normalised is not kept: the way back computes it anew, for less than it
 * costs to write and to read it. */

#define NORM_VECTORS (PANEL / VW)
/* Channels that are summed together: an addition waits for the one before it, and those
 * of eight vectors fill the time. A gradient has two sums. */
#define SUM_CHANNELS (VW / 4)
#define GRAD_CHANNELS (VW / 8 + (VW < 8))

typedef struct {
    const Call *call;
    int64_t channels, pixels;
} Images;

/* Vector k of `n` channels from c on, of one row of each: in a matrix with a row for
 * each pixel, at pixel 0, and in one with a row for each channel. */
INLINE int64_t image_at(const Images *g, int64_t c, int64_t s, int k) {
    int64_t row = s / PANEL * g->channels + c + k / NORM_VECTORS;
    return row * g->pixels * PANEL + k % NORM_VECTORS * VW;
}
INLINE float *lanes_of(const Images *g, int64_t buffer, int64_t c, int64_t s) {
    return g->call->buffers[buffer] + (s / PANEL * g->channels + c) * PANEL;
}

/* How many values micro-batch m has of a channel. */
INLINE float num_values(const Images *g, int64_t m) {
    return (float)((g->call->starts[m + 1] - g->call->starts[m]) * g->pixels);
}
/* The reduction over the samples of micro-batch m of a row with a lane for each. */
static float sum_lanes(const Images *g, Feature row, int64_t m) {
    int64_t end = g->call->starts[m + 1];
    float sum = 0;
    for (int64_t s = g->call->starts[m]; s < end; s += K_BLOCK)
        sum += block_sum(row, s, smaller(s + K_BLOCK, end));
    return sum;
}
static void fill_lanes(Feature row, int64_t start, int64_t end, float value) {
    for (int64_t s = start; s < end; s++)
        row.row[s / PANEL * row.step + s % PANEL] = value;
}
/* Padding is computed, too, with values that cost nothing. */
static void fill_padding(const Images *g, Feature row) {
    int64_t samples = num_samples(g->call);
    fill_lanes(row, samples, parts_of(samples, PANEL) * PANEL, 0);
}

/* Sums over the pixels of one panel, of x or of squared distances from the mean, as
 * lanes in the place of the inverse deviations. */
INLINE void sum_pixels(const Op *op, const Images *g, int64_t c, int64_t s, int n,
                       int is_square) {
    const float *x = g->call->buffers[op->i[0]];
    vf sums[SUM_CHANNELS * NORM_VECTORS] = {{0}}, means[SUM_CHANNELS * NORM_VECTORS];
    for (int k = 0; k < n * NORM_VECTORS; k++)
        means[k] = load(lanes_of(g, op->i[2], c, s) + k * VW);
    for (int64_t p = 0; p < g->pixels; p += K_BLOCK) {
        vf block[SUM_CHANNELS * NORM_VECTORS] = {{0}};
        int64_t end = smaller(p + K_BLOCK, g->pixels);
        for (int64_t i = p; i < end; i++)
            UNROLL for (int k = 0; k < n * NORM_VECTORS; k++) {
                vf d = load(x + image_at(g, c, s, k) + i * PANEL);
                if (is_square) d -= means[k];
                block[k] = is_square ? fma_(d, d, block[k]) : block[k] + d;
            }
        for (int k = 0; k < n * NORM_VECTORS; k++) sums[k] += block[k];
    }
    for (int k = 0; k < n * NORM_VECTORS; k++)
        store(lanes_of(g, op->i[3], c, s) + k * VW, sums[k]);
}
INLINE void sum_images(const Op *op, const Images *g, int64_t c, int n) {
    int64_t samples = num_samples(g->call);
    for (int64_t s = 0; s < samples; s += PANEL) sum_pixels(op, g, c, s, n, 0);
    for (int j = 0; j < n; j++) {
        Feature sums = feature_of(g->call, op->i[3], g->channels, c + j);
        Feature means = feature_of(g->call, op->i[2], g->channels, c + j);
        for (int64_t m = 0; m < g->call->micro_batches; m++)
            fill_lanes(means, g->call->starts[m], g->call->starts[m + 1],
                       sum_lanes(g, sums, m) / num_values(g, m));
        fill_padding(g, means);
    }
    for (int64_t s = 0; s < samples; s += PANEL) sum_pixels(op, g, c, s, n, 1);
}

/* The running statistic at `place` after micro-batch m: old + momentum (new - old). */
INLINE void push_running(const Op *op, TreeSums *sums, int64_t m, int64_t place,
                         float new, int is_empty) {
    if (place < 0) return;
    float old = sums->call->running[place];
    vf moved = fma_(splat(op->f[1]), splat(new - old), splat(old));
    push_sum(sums, m, is_empty ? old : moved[0]);
}
/* From the sums of squares of one channel to its inverse deviations. */
static void settle_channel(const Op *op, const Images *g, int64_t c) {
    const Call *call = g->call;
    Feature inverses = feature_of(call, op->i[3], g->channels, c);
    Feature means = feature_of(call, op->i[2], g->channels, c);
    TreeSums moved_means, moved_variances;
    int64_t mean = op->i[8] < 0 ? -1 : op->i[8] + c;
    int64_t variance = op->i[9] < 0 ? -1 : op->i[9] + c;
    begin_sum(&moved_means, call, call->tail + mean);
    begin_sum(&moved_variances, call, call->tail + variance);
    for (int64_t m = 0; m < call->micro_batches; m++) {
        int64_t s = call->starts[m], end = call->starts[m + 1];
        double values = (double)(end - s) * (double)g->pixels;
        float own = sum_lanes(g, inverses, m) / num_values(g, m);
        float ratio = (float)(values / (values - 1)), at = 0;
        if (end > s) at = means.row[s / PANEL * means.step + s % PANEL];
        fill_lanes(inverses, s, end, inverse_of(splat(own), op->f[0])[0]);
        push_running(op, &moved_means, m, mean, at, end == s);
        push_running(op, &moved_variances, m, variance, values > 1 ? own * ratio : 0,
                     end == s);
    }
    fill_padding(g, inverses);
}

/* The mean and inverse deviation of channel c, vector k of the panel from column s. */
INLINE void statistics_at(const Op *op, const Images *g, int64_t c, int64_t s, int k,
                          vf *mean, vf *inverse) {
    if (op->flags & OP_EVAL) {
        *mean = splat(g->call->running[op->i[8] + c]);
        *inverse = inverse_of(splat(g->call->running[op->i[9] + c]), op->f[0]);
    } else {
        *mean = load(lanes_of(g, op->i[2], c, s) + k * VW);
        *inverse = load(lanes_of(g, op->i[3], c, s) + k * VW);
    }
}

/* y = relu(fma(z, weight, bias) + added) of one channel, all panels. */
static void scale_images(const Op *op, const Images *g, int64_t c) {
    const Call *call = g->call;
    vf weight = splat(op->i[6] < 0 ? 1 : weights_at(call, op->i[6])[c]), mean, inverse;
    vf bias = splat(op->i[7] < 0 ? 0 : weights_at(call, op->i[7])[c]);
    const float *from = call->buffers[op->i[0]], *beside = NULL;
    if (op->i[10] >= 0) beside = call->buffers[op->i[10]];
    for (int64_t s = 0; s < num_samples(call); s += PANEL)
        for (int k = 0; k < NORM_VECTORS; k++) {
            int64_t place = image_at(g, c, s, k), end = place + g->pixels * PANEL;
            float *to = call->buffers[op->i[1]];
            statistics_at(op, g, c, s, k, &mean, &inverse);
            for (int64_t i = place; i < end; i += PANEL) {
                vf y = fma_((load(from + i) - mean) * inverse, weight, bias);
                if (beside) y += load(beside + i);
                store(to + i, op->flags & OP_RELU ? relu(y) : y);
            }
        }
}

static void op_batch_norm_2d(const Op *op, const Call *call) {
    Images g = {call, op->i[4], op->i[5]};
    int is_whole, n;
    for (int64_t c = 0; c < g.channels; c += n) {
        is_whole = c + SUM_CHANNELS <= g.channels, n = is_whole ? SUM_CHANNELS : 1;
        if (!(op->flags & OP_EVAL)) {
            is_whole ? sum_images(op, &g, c, SUM_CHANNELS) : sum_images(op, &g, c, 1);
            for (int j = 0; j < n; j++) settle_channel(op, &g, c + j);
        }
        for (int j = 0; j < n; j++) scale_images(op, &g, c + j);
    }
}

/* What the way back reads of one vector of pixels. `y` is the gate; without one, but
 * with a ReLU, what the ReLU was given is computed anew. */
typedef struct {
    vf mean, inverse, weight, bias;
    const float *x, *dy, *y;
    int is_cut;
} ImageGradient;

INLINE ImageGradient image_gradient(const Op *op, const Images *g, int64_t c, int64_t s,
                                    int k) {
    const Call *call = g->call;
    int64_t place = image_at(g, c, s, k), own = c + k / NORM_VECTORS;
    ImageGradient at = {.x = call->buffers[op->i[3]] + place,
                        .dy = call->buffers[op->i[0]] + place,
                        .is_cut = op->flags & OP_RELU};
    at.y = op->i[2] < 0 ? NULL : call->buffers[op->i[2]] + place;
    at.mean = load(lanes_of(g, op->i[4], c, s) + k * VW);
    at.inverse = load(lanes_of(g, op->i[5], c, s) + k * VW);
    at.weight = splat(op->i[9] < 0 ? 1 : weights_at(call, op->i[9])[own]);
    at.bias = splat(op->i[10] < 0 ? 0 : weights_at(call, op->i[10])[own]);
    return at;
}
INLINE vf normalised_at(const ImageGradient *at, int64_t i) {
    return (load(at->x + i) - at->mean) * at->inverse;
}
INLINE vf gated_at(const ImageGradient *at, int64_t i, vf z) {
    vf dy = load(at->dy + i);
    if (at->y) return keep(~(load(at->y + i) <= 0), dy);
    return at->is_cut ? keep(~(fma_(z, at->weight, at->bias) <= 0), dy) : dy;
}

/* Sums over the pixels of one panel, of dy and of dy z, as lanes: of sums and, behind
 * all channels of all panels, of products. */
INLINE void sum_gradients(const Op *op, const Images *g, int64_t c, int64_t s, int n) {
    vf sums[GRAD_CHANNELS * NORM_VECTORS][2] = {{{0}}};
    ImageGradient at[GRAD_CHANNELS * NORM_VECTORS];
    for (int k = 0; k < n * NORM_VECTORS; k++) at[k] = image_gradient(op, g, c, s, k);
    for (int64_t p = 0; p < g->pixels; p += K_BLOCK) {
        vf block[GRAD_CHANNELS * NORM_VECTORS][2] = {{{0}}};
        int64_t end = smaller(p + K_BLOCK, g->pixels);
        for (int64_t i = p * PANEL; i < end * PANEL; i += PANEL)
            UNROLL for (int k = 0; k < n * NORM_VECTORS; k++) {
                vf z = normalised_at(&at[k], i), dy = gated_at(&at[k], i, z);
                block[k][0] += dy;
                block[k][1] = fma_(dy, z, block[k][1]);
            }
        for (int k = 0; k < n * NORM_VECTORS; k++)
            for (int j = 0; j < 2; j++) sums[k][j] += block[k][j];
    }
    int64_t behind = g->call->capacity * g->channels;
    for (int k = 0; k < n * NORM_VECTORS; k++)
        for (int j = 0; j < 2; j++)
            store(lanes_of(g, op->i[6], c, s) + k * VW + j * behind, sums[k][j]);
}
/* From the sums of one channel to the gradients of its weight and bias; in the place of
 * the sums, what the gradient of x takes: them over the number of values. */
static void settle_gradient(const Op *op, const Images *g, int64_t c) {
    const Call *call = g->call;
    for (int j = 0; j < 2; j++) {
        Feature sums = feature_of(call, op->i[6], g->channels, c);
        sums.row += j * call->capacity * g->channels;
        int64_t place = op->i[j ? 11 : 12];
        TreeSums total;
        begin_sum(&total, call, place + c);
        for (int64_t m = 0; m < call->micro_batches; m++) {
            float own = sum_lanes(g, sums, m);
            if (place >= 0) push_sum(&total, m, own);
            fill_lanes(sums, call->starts[m], call->starts[m + 1],
                       own / num_values(g, m));
        }
        fill_padding(g, sums);
    }
}
/* dx = scale ((dy - mean) - z slope) of one channel, all panels. */
static void give_images(const Op *op, const Images *g, int64_t c) {
    for (int64_t s = 0; s < num_samples(g->call); s += PANEL)
        for (int k = 0; k < NORM_VECTORS; k++) {
            ImageGradient at = image_gradient(op, g, c, s, k);
            const float *sums = lanes_of(g, op->i[6], c, s) + k * VW;
            float *dx = g->call->buffers[op->i[1]] + image_at(g, c, s, k);
            vf mean = load(sums), slope = load(sums + g->call->capacity * g->channels);
            vf scale = at.weight * at.inverse;
            for (int64_t i = 0; i < g->pixels * PANEL; i += PANEL) {
                vf z = normalised_at(&at, i), dy = gated_at(&at, i, z);
                store(dx + i, scale * ((dy - mean) - z * slope));
            }
        }
}

static void op_batch_norm_2d_grad(const Op *op, const Call *call) {
    Images g = {call, op->i[7], op->i[8]};
    int64_t samples = num_samples(call);
    int is_whole, n;
    for (int64_t c = 0; c < g.channels; c += n) {
        is_whole = c + GRAD_CHANNELS <= g.channels, n = is_whole ? GRAD_CHANNELS : 1;
        for (int64_t s = 0; s < samples; s += PANEL)
            is_whole ? sum_gradients(op, &g, c, s, GRAD_CHANNELS)
                     : sum_gradients(op, &g, c, s, 1);
        for (int j = 0; j < n; j++) settle_gradient(op, &g, c + j);
        for (int j = 0; j < n; j++) give_images(op, &g, c + j);
    }
}
