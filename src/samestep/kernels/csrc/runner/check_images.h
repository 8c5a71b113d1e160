/* Whether operations on images stay within their buffers: part of check.c. */

/* The pixels of a convolution's outputs in one dimension, 0 if it is none. */
static int64_t conv_side(const int64_t *i) {
    int64_t in = i[0], kernel = i[2], stride = i[4], padding = i[6], dilation = i[8];
    if (!is_size(in) || !is_size(kernel) || !is_size(stride) || !is_size(dilation) ||
        padding < 0 || padding > MOST)
        return 0;
    int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}
static int64_t product_of_sizes(int64_t a, int64_t b, int64_t c) {
    return is_size(a) && is_size(b) && is_size(a * b) && is_size(c) ? a * b * c : 0;
}
/* The elements of dy of a convolution's gradient whose results were pooled. */
static int64_t pooled_size(const Training *t, const int64_t *i) {
    if (!is_size(i[19]) || !is_size(i[20])) return 0;
    int64_t size = product_of_sizes(i[3], i[21], i[22]);
    return by_feature(t, i[18], size) ? size : 0;
}
static int is_conv(const Training *t, const Op *op) {
    const int64_t *i = op->i, in = i[2], out = i[3], groups = i[4];
    if (!is_size(in) || !is_size(out) || !is_size(groups) || in % groups ||
        out % groups)
        return 0;
    int64_t images = product_of_sizes(in, i[5], i[6]);
    int64_t results = product_of_sizes(out, conv_side(i + 5), conv_side(i + 6));
    if (op->kind == OP_CONV_GRAD_WEIGHT && i[18] != -1) {
        if (!is_size(results)) return 0;
        results = pooled_size(t, i);
    }
    int64_t weights = product_of_sizes(in / groups, i[7], i[8]);
    int is_weight = op->kind == OP_CONV_GRAD_WEIGHT;
    int is_back = is_weight || op->kind == OP_CONV_GRAD_INPUT;
    return by_feature(t, i[0], is_back ? results : images) &&
           by_feature(t, i[1], is_back ? images : results) &&
           (is_matrix(t, i[15], weights, out) || (is_weight && i[15] == -1)) &&
           (i[16] == -1 || (op->kind == OP_CONV_GRAD_INPUT
                                ? by_feature(t, i[16], images)
                                : in_weights(t, i[16], out))) &&
           (!is_weight || (by_feature(t, i[17], CONV_SUMS) && i[15] < CONSTANTS &&
                           i[16] < CONSTANTS)) &&
           (op->kind != OP_CONV_GRAD_INPUT || i[17] == -1 || in_weights(t, i[17], in)) &&
           (op->kind != OP_CONV || is_probability(op->f[0]));
}

static int is_conv_max_pool(const Training *t, const Op *op) {
    const int64_t *i = op->i, in = i[2], out = i[3], groups = i[4];
    if (!is_size(in) || !is_size(out) || !is_size(groups) || in % groups ||
        out % groups || !is_size(i[20]) || !is_size(i[21]))
        return 0;
    int64_t width = conv_side(i + 6);
    int64_t images = product_of_sizes(in, i[5], i[6]);
    int64_t pooled = product_of_sizes(out, conv_side(i + 5) / i[20], width / i[21]);
    int64_t terms = product_of_sizes(in / groups, i[7], i[8]);
    int64_t room = product_of_sizes(out, i[20], width);
    return terms <= K_BLOCK && is_size(room) && has(t, i[19], room * PANEL) &&
           by_feature(t, i[0], images) && by_feature(t, i[1], pooled) &&
           is_matrix(t, i[15], terms, out) &&
           (i[16] == -1 || in_weights(t, i[16], out)) &&
           (i[18] == -1 || by_feature(t, i[18], pooled));
}

/* One axis of a pool: every window has a pixel of the image. */
static int is_axis(const int64_t *i) {
    int64_t size = i[0], out = i[1], kernel = i[2];
    int64_t stride = i[3], padding = i[4], dilation = i[5];
    if (!is_size(size) || !is_size(out)) return 0;
    if (kernel == 0) return 1;
    return is_size(kernel) && is_size(stride) && is_size(dilation) && padding >= 0 &&
           padding <= (kernel - 1) * dilation && (padding == 0 || dilation <= size) &&
           (out - 1) * stride - padding < size;
}
static int is_pool(const Training *t, const Op *op) {
    const int64_t *i = op->i;
    int is_grad = op->kind == OP_MAX_POOL_GRAD || op->kind == OP_MEAN_POOL_GRAD;
    int is_max = op->kind == OP_MAX_POOL || op->kind == OP_MAX_POOL_GRAD;
    if (!is_axis(i + 4) || !is_axis(i + 10) || !is_size(i[3])) return 0;
    int64_t pixels = i[4] * i[10], out = i[5] * i[11];
    if (!is_size(pixels) || !is_size(out)) return 0;
    return by_feature(t, i[0], i[3] * (is_grad ? out : pixels)) &&
           by_feature(t, i[1], i[3] * (is_grad ? pixels : out)) &&
           (is_max ? (i[2] == -1 && !is_grad) || by_feature(t, i[2], i[3] * out)
                   : i[16] >= -1);
}

static int optional(int is_there, int64_t i) { return i == -1 || is_there; }

static int is_batch_norm_2d(const Training *t, const Op *op) {
    const int64_t *i = op->i, channels = i[4], pixels = i[5];
    if (!is_size(channels) || !is_size(pixels) || op->flags & OP_EVAL) return 0;
    return by_feature(t, i[0], channels * pixels) &&
           by_feature(t, i[1], channels * pixels) && by_feature(t, i[2], channels) &&
           by_feature(t, i[3], channels) &&
           optional(in_weights(t, i[6], channels), i[6]) &&
           optional(in_weights(t, i[7], channels), i[7]) &&
           optional(in_running(t, i[8], channels), i[8]) &&
           optional(in_running(t, i[9], channels), i[9]) &&
           optional(by_feature(t, i[10], channels * pixels), i[10]);
}
static int is_batch_norm_2d_grad(const Training *t, const int64_t *i) {
    int64_t channels = i[7], pixels = i[8];
    if (!is_size(channels) || !is_size(pixels)) return 0;
    int is_room = optional(by_feature(t, i[2], channels * pixels), i[2]) &&
                  by_feature(t, i[4], channels) && by_feature(t, i[5], channels) &&
                  by_feature(t, i[6], 2 * channels);
    for (int k = 0; k < 4; k += 3) /* dy and x */
        is_room = is_room && by_feature(t, i[k], channels * pixels);
    for (int k = 9; k < 11; k++) /* weight and bias; then their gradients */
        is_room = is_room && optional(in_weights(t, i[k], channels), i[k]) &&
                  optional(in_parameters(t, i[k + 2], channels), i[k + 2]);
    return is_room && by_feature(t, i[1], channels * pixels);
}
