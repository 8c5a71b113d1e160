/* LayerNorm over the features of every position and sample. Each sum is one chain, so
 * several positions are computed side by side: an addition takes four cycles. */
#define NORM_POSITIONS 8


/* Positions and features of one panel; rows are from the first of the panel on. */
typedef struct {
    const float *x, *dy;
    float *y, *means, *inverses;
    float *sums; /* [2, features] of the gradient, or NULL */
    Place of_x, of_y, of_dy;
    int64_t features, positions;
    const float *weight, *bias; /* or NULL */
    float eps;
} Norm;

INLINE int64_t place_of(Place place, int64_t position, int64_t feature) {
    return (place.first + position * place.step + feature) * PANEL;
}

/* sums[p] += the terms of position first + p, for features of one block. */
#define SUM_BLOCKS(sums, positions, norm, f, term)                            \
    UNROLL for (int p = 0; p < (positions); p++) sums[p] = (vf){0};           \
    for (int64_t start = 0; start < (norm)->features; start += K_BLOCK) {     \
        int64_t end = smaller(start + K_BLOCK, (norm)->features);             \
        vf block[NORM_POSITIONS];                                             \
        UNROLL for (int p = 0; p < (positions); p++) block[p] = (vf){0};      \
        for (int64_t f = start; f < end; f++)                                 \
            UNROLL for (int p = 0; p < (positions); p++) block[p] += (term);  \
        UNROLL for (int p = 0; p < (positions); p++) sums[p] += block[p];     \
    }
#define EACH_POSITION UNROLL for (int p = 0; p < positions; p++)

/* Positions [first, first + positions) of one vector of columns. */
INLINE void norm_positions(const Norm *n, int64_t first, int64_t c, int positions) {
    const float *x[NORM_POSITIONS];
    float *y[NORM_POSITIONS], size = (float)n->features;
    vf means[NORM_POSITIONS], sums[NORM_POSITIONS];
    EACH_POSITION x[p] = n->x + place_of(n->of_x, first + p, 0) + c;
    EACH_POSITION y[p] = n->y + place_of(n->of_y, first + p, 0) + c;
    SUM_BLOCKS(means, positions, n, f, load(x[p] + f * PANEL))
    EACH_POSITION means[p] /= size;
    SUM_BLOCKS(sums, positions, n, f,
               (load(x[p] + f * PANEL) - means[p]) * (load(x[p] + f * PANEL) - means[p]))
    EACH_POSITION {
        sums[p] = inverse_of(sums[p] / size, n->eps);
        store(n->means + (first + p) * PANEL + c, means[p]);
        store(n->inverses + (first + p) * PANEL + c, sums[p]);
    }
    for (int64_t f = 0; f < n->features; f++) {
        vf weight = splat(n->weight ? n->weight[f] : 1);
        vf bias = splat(n->bias ? n->bias[f] : 0);
        EACH_POSITION {
            vf z = (load(x[p] + f * PANEL) - means[p]) * sums[p];
            if (n->weight) z = n->bias ? fma_(z, weight, bias) : z * weight;
            store(y[p] + f * PANEL, z);
        }
    }
}

static void norm_panel(const Norm *n, int64_t columns) {
    int64_t first = 0;
    for (; first + NORM_POSITIONS <= n->positions; first += NORM_POSITIONS)
        for (int64_t c = 0; c < columns; c += VW)
            norm_positions(n, first, c, NORM_POSITIONS);
    for (; first < n->positions; first++)
        for (int64_t c = 0; c < columns; c += VW) norm_positions(n, first, c, 1);
}

/* i: x, y, means, inverses, features, positions, places, weight, bias. */
static void op_layer_norm(const Op *op, const Call *call) {
    const int64_t *i = op->i;
    Norm n = {.features = i[4],
              .positions = i[5],
              .of_x = place_at(i + 6),
              .of_y = place_at(i + 9),
              .weight = i[12] < 0 ? NULL : weights_at(call, i[12]),
              .bias = i[13] < 0 ? NULL : weights_at(call, i[13]),
              .eps = op->f[0]};
    for (int64_t s = 0; s < num_samples(call); s += PANEL) {
        n.x = call->buffers[i[0]] + s * n.of_x.rows;
        n.y = call->buffers[i[1]] + s * n.of_y.rows;
        n.means = call->buffers[i[2]] + s * n.positions;
        n.inverses = call->buffers[i[3]] + s * n.positions;
        norm_panel(&n, columns_at(call, s));
    }
}

/* The gradient of the inputs of positions [first, first + positions); y are dx. */
INLINE void norm_grad_positions(const Norm *n, int64_t first, int64_t c,
                                int positions) {
    const float *x[NORM_POSITIONS], *dy[NORM_POSITIONS];
    float *dx[NORM_POSITIONS], size = (float)n->features;
    vf means[NORM_POSITIONS], inverses[NORM_POSITIONS];
    vf sums[NORM_POSITIONS], products[NORM_POSITIONS];
    EACH_POSITION {
        x[p] = n->x + place_of(n->of_x, first + p, 0) + c;
        dy[p] = n->dy + place_of(n->of_dy, first + p, 0) + c;
        dx[p] = n->y + place_of(n->of_y, first + p, 0) + c;
        means[p] = load(n->means + (first + p) * PANEL + c);
        inverses[p] = load(n->inverses + (first + p) * PANEL + c);
    }
#define WEIGHTED(f) (load(dy[p] + (f)*PANEL) * (n->weight ? n->weight[f] : 1))
#define NORMALISED(f) ((load(x[p] + (f)*PANEL) - means[p]) * inverses[p])
    SUM_BLOCKS(sums, positions, n, f, WEIGHTED(f))
    SUM_BLOCKS(products, positions, n, f, WEIGHTED(f) * NORMALISED(f))
    EACH_POSITION sums[p] /= size;
    EACH_POSITION products[p] /= size;
    for (int64_t f = 0; f < n->features; f++)
        EACH_POSITION store(dx[p] + f * PANEL,
                            inverses[p] * ((WEIGHTED(f) - sums[p]) -
                                           NORMALISED(f) * products[p]));
}
/* The sums over positions of dy z and dy, feature by feature. */
INLINE void norm_grad_sums(const Norm *n, int64_t f, int64_t c) {
    vf weights = {0}, biases = {0};
    for (int64_t start = 0; start < n->positions; start += K_BLOCK) {
        int64_t end = smaller(start + K_BLOCK, n->positions);
        vf of_weight = {0}, of_bias = {0};
        for (int64_t p = start; p < end; p++) {
            vf dy = load(n->dy + place_of(n->of_dy, p, f) + c);
            vf x = load(n->x + place_of(n->of_x, p, f) + c);
            vf mean = load(n->means + p * PANEL + c);
            vf inverse = load(n->inverses + p * PANEL + c);
            of_weight += dy * ((x - mean) * inverse);
            of_bias += dy;
        }
        weights += of_weight, biases += of_bias;
    }
    store(n->sums + f * PANEL + c, weights);
    store(n->sums + (n->features + f) * PANEL + c, biases);
}

static void norm_grad_panel(const Norm *n, int64_t columns) {
    for (int64_t f = 0; f < n->features && n->sums; f++)
        for (int64_t c = 0; c < columns; c += VW) norm_grad_sums(n, f, c);
    int64_t first = 0;
    for (; first + NORM_POSITIONS / 2 <= n->positions; first += NORM_POSITIONS / 2)
        for (int64_t c = 0; c < columns; c += VW)
            norm_grad_positions(n, first, c, NORM_POSITIONS / 2);
    for (; first < n->positions; first++)
        for (int64_t c = 0; c < columns; c += VW) norm_grad_positions(n, first, c, 1);
}

static void op_layer_norm_grad(const Op *op, const Call *call) {
    const int64_t *i = op->i;
    Norm n = {.features = i[6],
              .positions = i[7],
              .of_dy = place_at(i + 8),
              .of_y = place_at(i + 11),
              .of_x = place_at(i + 14),
              .weight = i[17] < 0 ? NULL : weights_at(call, i[17])};
    for (int64_t s = 0; s < num_samples(call); s += PANEL) {
        n.dy = call->buffers[i[0]] + s * n.of_dy.rows;
        n.y = call->buffers[i[1]] + s * n.of_y.rows;
        n.x = call->buffers[i[2]] + s * n.of_x.rows;
        n.means = call->buffers[i[3]] + s * n.positions;
        n.inverses = call->buffers[i[4]] + s * n.positions;
        n.sums = i[5] < 0 ? NULL : call->buffers[i[5]] + s * 2 * n.features;
        norm_grad_panel(&n, columns_at(call, s));
    }
}
