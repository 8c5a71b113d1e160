/* Recurrent layers: LSTM, GRU, and plain ones with tanh or ReLU. The products with the
 * inputs of all steps come from OP_LINEAR; here are the steps, one after the other, a
 * panel of samples at a time, so that its state stays in the nearest cache. The weights
 * of the state are packed once for all steps. */

/* A recurrent layer's numbers. A gate is `hidden` rows; `rows` is all of them. */
typedef struct {
    int64_t steps, hidden, rows;
    const float *w; /* of the state: [rows, hidden] */
    float *packed;  /* its tiles */
    float *sums;    /* room for one panel of products */
    float *carried; /* room for [hidden] of a panel, from step to step */
    int32_t is_reversed;
} Recurrent;

/* What a step reads and writes of one panel; the names are those of the specification.
 * `state` is that of this step, `before` that of the step before in time. */
typedef struct {
    const float *bias; /* of the state's product, or NULL */
    float *gates;      /* by gate */
    const float *before;
    float *state;
    const float *cell_before;
    float *cell, *tanh_cell; /* of an LSTM */
    float *state_sums;       /* of a GRU, by gate */
    const float *dy;         /* or NULL */
    const float *sums;
    float *carried;
    int64_t hidden;
} Step;

/* Pack the weights for the forward pass, where the gates of a unit are neighbours: row
 * `unit * gates + gate`. */
static void pack_by_unit(const Recurrent *r) {
    int64_t gates = r->rows / r->hidden, tiles = parts_of(r->rows, TILE_ROWS);
    for (int64_t n = 0; n < tiles; n++) {
        float *pack = r->packed + n * TILE_ROWS * r->hidden;
        int64_t first = first_row(r->rows, tiles, n);
        int64_t rows = first_row(r->rows, tiles, n + 1) - first;
        for (int64_t j = 0; j < rows; j++) {
            int64_t gate = (first + j) % gates, unit = (first + j) / gates;
            const float *w = r->w + (gate * r->hidden + unit) * r->hidden;
            for (int64_t k = 0; k < r->hidden; k++) pack[k * TILE_ROWS + j] = w[k];
        }
    }
}

/* And for the backward pass, where the gates are the terms. */
static void pack_transposed(const Recurrent *r) {
    int64_t tiles = parts_of(r->hidden, TILE_ROWS);
    for (int64_t n = 0; n < tiles; n++) {
        int64_t first = first_row(r->hidden, tiles, n);
        pack_by_k(r->packed + n * TILE_ROWS * r->rows, r->w + first, r->hidden,
                  first_row(r->hidden, tiles, n + 1) - first, r->rows);
    }
}

/* Tile n of a product with packed weights: c = sum over k of packed[k] b[k, :]. */
static void multiply_tile(const float *packed, int64_t row, int64_t rows,
                          int64_t terms, const float *b, float *c, int64_t columns) {
    for (int64_t s = 0; s < columns; s += TILE_COLUMNS)
        for (int64_t k = 0; k < terms; k += K_BLOCK) {
            const float *a = packed + k * TILE_ROWS;
            Tile t = {.a = a,
                      .a_step = TILE_ROWS,
                      .b = b + k * PANEL + s,
                      .c = c + row * PANEL + s,
                      .c_step = PANEL,
                      .columns = smaller(TILE_COLUMNS, columns - s),
                      .terms = smaller(K_BLOCK, terms - k),
                      .is_addition = k > 0,
                      .ahead = a + K_BLOCK,
                      .ahead_step = TILE_ROWS};
            fill(&t, rows, 1);
        }
}

typedef void (*Units)(const Step *s, int64_t first, int64_t end, int64_t columns);

/* The product with the state before, and the units of every tile as they are summed. */
static void step_forward(const Recurrent *r, const Step *s, int64_t columns,
                         int is_product, Units units) {
    int64_t gates = r->rows / r->hidden, tiles = parts_of(r->rows, TILE_ROWS);
    for (int64_t n = 0, done = 0; n < tiles; n++) {
        int64_t row = first_row(r->rows, tiles, n);
        int64_t end = first_row(r->rows, tiles, n + 1);
        float *sums = r->sums + row * PANEL;
        if (is_product)
            multiply_tile(r->packed + n * TILE_ROWS * r->hidden, row, end - row,
                          r->hidden, s->before, r->sums, columns);
        else
            memset(sums, 0, (end - row) * PANEL * sizeof(float));
        units(s, done, end / gates, columns);
        done = end / gates;
    }
}

/* The sum of gate g of a unit: with the inputs, and with the state. */
INLINE vf state_sum(const Step *s, int64_t gates, int64_t g, int64_t unit, int64_t c) {
    vf sum = load(s->sums + (unit * gates + g) * PANEL + c);
    return s->bias ? sum + splat(s->bias[g * s->hidden + unit]) : sum;
}
INLINE float *gate_of(const Step *s, int64_t g, int64_t unit, int64_t c) {
    return s->gates + (g * s->hidden + unit) * PANEL + c;
}

INLINE void lstm_unit(const Step *s, int64_t unit, int64_t c) {
    vf z[4];
    UNROLL for (int g = 0; g < 4; g++)
        z[g] = load(gate_of(s, g, unit, c)) + state_sum(s, 4, g, unit, c);
    z[0] = sigmoid_(z[0]), z[1] = sigmoid_(z[1]), z[3] = sigmoid_(z[3]);
    z[2] = tanh_(z[2]);
    UNROLL for (int g = 0; g < 4; g++) store(gate_of(s, g, unit, c), z[g]);
    int64_t place = unit * PANEL + c;
    vf cell = fma_(z[1], load(s->cell_before + place), z[0] * z[2]);
    vf tanh_cell = tanh_(cell);
    store(s->cell + place, cell);
    store(s->tanh_cell + place, tanh_cell);
    store(s->state + place, z[3] * tanh_cell);
}

INLINE void gru_unit(const Step *s, int64_t unit, int64_t c) {
    float *gates[3];
    vf sums[3];
    UNROLL for (int g = 0; g < 3; g++) {
        gates[g] = gate_of(s, g, unit, c);
        sums[g] = state_sum(s, 3, g, unit, c);
    }
    vf reset = sigmoid_(load(gates[0]) + sums[0]);
    vf update = sigmoid_(load(gates[1]) + sums[1]);
    vf new = tanh_(fma_(reset, sums[2], load(gates[2])));
    int64_t place = unit * PANEL + c;
    vf state = fma_(update, load(s->before + place) - new, new);
    store(gates[0], reset);
    store(gates[1], update);
    store(gates[2], new);
    store(s->state_sums + 2 * s->hidden * PANEL + place, sums[2]);
    store(s->state + place, state);
}

INLINE void tanh_unit(const Step *s, int64_t unit, int64_t c) {
    vf sum = load(gate_of(s, 0, unit, c)) + state_sum(s, 1, 0, unit, c);
    store(s->state + unit * PANEL + c, tanh_(sum));
}
INLINE void relu_unit(const Step *s, int64_t unit, int64_t c) {
    vf sum = load(gate_of(s, 0, unit, c)) + state_sum(s, 1, 0, unit, c);
    store(s->state + unit * PANEL + c, relu(sum));
}

/* Gradients below 2^-64 count as zero, as those of losses: over many steps they fade,
 * and products with subnormal numbers are slow. */
INLINE vf not_tiny(vf x) { return keep(~(abs_(x) < 0x1p-64f), x); }
INLINE vf one_minus_square(vf x) { return fma_(-x, x, splat(1)); }
INLINE vf sigmoid_slope(vf y) { return y * (1 - y); }

/* The gradient of a unit's state: from its output and from the step after. */
INLINE vf grad_of_state(const Step *s, int64_t place) {
    vf later = load(s->sums + place);
    return s->dy ? load(s->dy + place) + later : later;
}

INLINE void lstm_unit_grad(const Step *s, int64_t unit, int64_t c) {
    int64_t place = unit * PANEL + c;
    vf z[4];
    UNROLL for (int g = 0; g < 4; g++) z[g] = load(gate_of(s, g, unit, c));
    vf dh = grad_of_state(s, place), tanh_cell = load(s->tanh_cell + place);
    vf dc = fma_(dh * z[3], one_minus_square(tanh_cell), load(s->carried + place));
    vf dz[4] = {(dc * z[2]) * sigmoid_slope(z[0]),
                (dc * load(s->cell_before + place)) * sigmoid_slope(z[1]),
                (dc * z[0]) * one_minus_square(z[2]),
                (dh * tanh_cell) * sigmoid_slope(z[3])};
    UNROLL for (int g = 0; g < 4; g++) store(gate_of(s, g, unit, c), not_tiny(dz[g]));
    store(s->carried + place, not_tiny(dc * z[1]));
}

INLINE void gru_unit_grad(const Step *s, int64_t unit, int64_t c) {
    int64_t place = unit * PANEL + c, gate = s->hidden * PANEL;
    vf z[3];
    UNROLL for (int g = 0; g < 3; g++) z[g] = load(gate_of(s, g, unit, c));
    vf later = load(s->carried + place) + load(s->sums + place);
    vf dh = s->dy ? load(s->dy + place) + later : later;
    vf dnew = not_tiny((dh * (1 - z[1])) * one_minus_square(z[2]));
    float *sums = s->state_sums + place;
    vf dz[3] = {(dnew * load(sums + 2 * gate)) * sigmoid_slope(z[0]),
                (dh * (load(s->before + place) - z[2])) * sigmoid_slope(z[1]),
                dnew};
    UNROLL for (int g = 0; g < 3; g++) store(gate_of(s, g, unit, c), not_tiny(dz[g]));
    store(sums, not_tiny(dz[0]));
    store(sums + gate, not_tiny(dz[1]));
    store(sums + 2 * gate, not_tiny(dnew * z[0]));
    store(s->carried + place, not_tiny(dh * z[1]));
}

INLINE void tanh_unit_grad(const Step *s, int64_t unit, int64_t c) {
    int64_t place = unit * PANEL + c;
    vf dh = grad_of_state(s, place), y = load(s->state + place);
    store(s->gates + place, not_tiny(dh * one_minus_square(y)));
}
INLINE void relu_unit_grad(const Step *s, int64_t unit, int64_t c) {
    int64_t place = unit * PANEL + c;
    vf dh = grad_of_state(s, place), y = load(s->state + place);
    store(s->gates + place, not_tiny(keep(~(y <= 0), dh)));
}

#define UNITS(name)                                                              \
    static void name##s(const Step *s, int64_t first, int64_t end,               \
                        int64_t columns) {                                       \
        for (int64_t unit = first; unit < end; unit++)                           \
            for (int64_t c = 0; c < columns; c += VW) name(s, unit, c);          \
    }
UNITS(lstm_unit)
UNITS(gru_unit)
UNITS(tanh_unit)
UNITS(relu_unit)
UNITS(lstm_unit_grad)
UNITS(gru_unit_grad)
UNITS(tanh_unit_grad)
UNITS(relu_unit_grad)

/* The buffers of a call, at panel `panel` and step `t`. */
typedef struct {
    float *gates, *states, *kept;
    const float *dy;
    int64_t dy_step; /* the only step that has an output's gradient, or -1: all */
} History;

static Step step_at(const Recurrent *r, const History *h, int64_t panel, int64_t t) {
    int64_t unit = r->hidden * PANEL, gates = r->rows / r->hidden;
    int64_t slot = t + !r->is_reversed, before = t + r->is_reversed;
    float *states = h->states + panel * (r->steps + 1) * unit;
    Step s = {.gates = h->gates + (panel * r->steps + t) * r->rows * PANEL,
              .before = states + before * unit,
              .state = states + slot * unit,
              .sums = r->sums,
              .carried = r->carried,
              .hidden = r->hidden};
    if (gates == 4) {
        float *cells = h->kept + panel * (2 * r->steps + 1) * unit;
        s.cell_before = cells + before * unit;
        s.cell = cells + slot * unit;
        s.tanh_cell = cells + (r->steps + 1 + t) * unit;
    }
    if (gates == 3) s.state_sums = h->kept + (panel * r->steps + t) * r->rows * PANEL;
    if (h->dy && h->dy_step < 0) s.dy = h->dy + (panel * r->steps + t) * unit;
    if (h->dy && h->dy_step == t) s.dy = h->dy + panel * unit;
    return s;
}

INLINE int64_t columns_of(const Call *call, int64_t panel) {
    int64_t samples = smaller(PANEL, num_samples(call) - panel * PANEL);
    return parts_of(samples, VW) * VW;
}
/* A panel of [hidden]: of a buffer, or zeros without one. */
static void copy_or_clear(float *to, const float *from, int64_t panel,
                          int64_t hidden) {
    size_t size = hidden * PANEL * sizeof(float);
    if (from)
        memcpy(to, from + panel * hidden * PANEL, size);
    else
        memset(to, 0, size);
}

/* Numbers 4 to 7 of the operation are steps, hidden, the weights and the bias. */
static void run_steps(const Op *op, const Call *call, int64_t gates, Units units) {
    int64_t hidden = op->i[5], rows = gates * hidden;
    Recurrent r = {.steps = op->i[4],
                   .hidden = hidden,
                   .rows = rows,
                   .w = weights_at(call, op->i[6]),
                   .packed = call->buffers[op->i[3]],
                   .is_reversed = op->flags & OP_REVERSED ? 1 : 0};
    r.sums = r.packed + ROOM(rows, hidden);
    History h = {.gates = call->buffers[op->i[0]],
                 .states = call->buffers[op->i[1]],
                 .kept = buffer_or_null(call, op->i[2])};
    const float *state = buffer_or_null(call, op->i[8]);
    const float *cell = buffer_or_null(call, op->i[9]);
    pack_by_unit(&r);
    for (int64_t panel = 0; panel * PANEL < num_samples(call); panel++)
        for (int64_t n = 0; n < r.steps; n++) {
            Step s = step_at(&r, &h, panel, r.is_reversed ? r.steps - 1 - n : n);
            if (op->i[7] >= 0) s.bias = weights_at(call, op->i[7]);
            if (n == 0) {
                copy_or_clear((float *)s.before, state, panel, hidden);
                if (gates == 4)
                    copy_or_clear((float *)s.cell_before, cell, panel, hidden);
            }
            step_forward(&r, &s, columns_of(call, panel), n > 0 || state, units);
        }
}

static void multiply_back(const Recurrent *r, const float *dz, int64_t columns) {
    int64_t tiles = parts_of(r->hidden, TILE_ROWS);
    for (int64_t n = 0; n < tiles; n++) {
        int64_t row = first_row(r->hidden, tiles, n);
        multiply_tile(r->packed + n * TILE_ROWS * r->rows, row,
                      first_row(r->hidden, tiles, n + 1) - row, r->rows, dz, r->sums,
                      columns);
    }
}

/* The gradients of a panel's first state and cell, for the operation's caller. */
static void keep_carried(const Recurrent *r, float *state, float *cell,
                         int64_t panel) {
    int64_t size = r->hidden * PANEL;
    for (int64_t i = 0; state && i < size; i += VW) {
        vf sum = load(r->sums + i);
        if (r->rows == 3 * r->hidden) sum = load(r->carried + i) + sum;
        store(state + panel * size + i, sum);
    }
    if (cell) memcpy(cell + panel * size, r->carried, size * sizeof(float));
}

static void run_steps_back(const Op *op, const Call *call, int64_t gates,
                           Units units) {
    int64_t hidden = op->i[6], rows = gates * hidden;
    Recurrent r = {.steps = op->i[5],
                   .hidden = hidden,
                   .rows = rows,
                   .w = weights_at(call, op->i[7]),
                   .packed = call->buffers[op->i[4]],
                   .is_reversed = op->flags & OP_REVERSED ? 1 : 0};
    r.sums = r.packed + ROOM(hidden, rows);
    r.carried = r.sums + hidden * PANEL;
    History h = {.gates = call->buffers[op->i[1]],
                 .states = call->buffers[op->i[2]],
                 .kept = buffer_or_null(call, op->i[3]),
                 .dy = buffer_or_null(call, op->i[0]),
                 .dy_step = op->i[8]};
    float *state = buffer_or_null(call, op->i[9]);
    float *cell = buffer_or_null(call, op->i[10]);
    int is_given = op->flags & OP_LAST_STATE;
    pack_transposed(&r);
    for (int64_t panel = 0; panel * PANEL < num_samples(call); panel++) {
        int64_t columns = columns_of(call, panel);
        copy_or_clear(r.sums, is_given ? state : NULL, panel, hidden);
        copy_or_clear(r.carried, is_given ? cell : NULL, panel, hidden);
        for (int64_t n = r.steps - 1; n >= 0; n--) {
            int64_t t = r.is_reversed ? r.steps - 1 - n : n;
            Step s = step_at(&r, &h, panel, t);
            units(&s, 0, hidden, columns);
            if (n > 0 || state)
                multiply_back(&r, gates == 3 ? s.state_sums : s.gates, columns);
        }
        keep_carried(&r, state, cell, panel);
    }
}

static void op_lstm(const Op *op, const Call *call) {
    run_steps(op, call, 4, lstm_units);
}
static void op_lstm_grad(const Op *op, const Call *call) {
    run_steps_back(op, call, 4, lstm_unit_grads);
}
static void op_gru(const Op *op, const Call *call) {
    run_steps(op, call, 3, gru_units);
}
static void op_gru_grad(const Op *op, const Call *call) {
    run_steps_back(op, call, 3, gru_unit_grads);
}
static void op_rnn(const Op *op, const Call *call) {
    run_steps(op, call, 1, op->flags & OP_RELU ? relu_units : tanh_units);
}
static void op_rnn_grad(const Op *op, const Call *call) {
    run_steps_back(op, call, 1, op->flags & OP_RELU ? relu_unit_grads
                                                    : tanh_unit_grads);
}
