/* The recurrent layers of docs/arithmetic.md, one sample and one unit after the other,
 * as plainly as they can be written: what the kernels are compared with. */
#include <stdlib.h>

#include "reference_functions.h"
#include "samestep.h"

/* One sample's column of a matrix by feature: element `row` of it. */
typedef struct {
    float *buffers;
    int64_t first;
} Column;
static Column column(const Call *call, int64_t buffer, int64_t rows, int64_t s) {
    if (buffer < 0) return (Column){0};
    return (Column){call->buffers[buffer], s / 32 * rows * 32 + s % 32};
}
static float *at(Column c, int64_t row) { return c.buffers + c.first + row * 32; }

/* The sum over k of w[k * step] * b[row + k]. */
static float product(const float *w, int64_t step, Column b, int64_t row, int64_t n) {
    float total = 0;
    for (int64_t k = 0; k < n; k += 256) {
        float s = 0;
        for (int64_t j = k; j < n && j < k + 256; j++)
            s = fmaf(w[j * step], *at(b, row + j), s);
        total = k == 0 ? s : total + s;
    }
    return total;
}
static float tiny(float x) { return fabsf(x) < 0x1p-64f ? 0 : x; }

static int64_t gates_of(const Op *op) {
    int is_lstm = op->kind == OP_LSTM || op->kind == OP_LSTM_GRAD;
    return is_lstm ? 4 : op->kind == OP_GRU || op->kind == OP_GRU_GRAD ? 3 : 1;
}
static int64_t kept_rows(int64_t gates, int64_t steps, int64_t hidden) {
    return (gates == 4 ? 2 * steps + 1 : steps * gates) * hidden;
}

static void unit_forward(const Op *op, const Call *call, int64_t gates, int64_t t,
                         int64_t s, int64_t u) {
    int64_t steps = op->i[4], n = op->i[5];
    int64_t slot = t + 1, before = t;
    if (op->flags & OP_REVERSED) slot = t, before = t + 1;
    Column a = column(call, op->i[0], steps * gates * n, s);
    Column h = column(call, op->i[1], (steps + 1) * n, s);
    Column kept = column(call, op->i[2], kept_rows(gates, steps, n), s);
    float sum[4], *gate[4];
    for (int64_t g = 0; g < gates; g++) {
        const float *w = call->parameters + op->i[6] + (g * n + u) * n;
        int is_first = t == (op->flags & OP_REVERSED ? steps - 1 : 0);
        sum[g] = is_first && op->i[8] < 0 ? 0 : product(w, 1, h, before * n, n);
        if (op->i[7] >= 0) sum[g] += call->parameters[op->i[7] + g * n + u];
        gate[g] = at(a, (t * gates + g) * n + u);
    }
    if (gates == 4) {
        *gate[0] = (float)sigmoid_of(*gate[0] + sum[0]), *gate[1] = (float)sigmoid_of(*gate[1] + sum[1]);
        *gate[2] = (float)tanh_of(*gate[2] + sum[2]), *gate[3] = (float)sigmoid_of(*gate[3] + sum[3]);
        float c = fmaf(*gate[1], *at(kept, before * n + u), *gate[0] * *gate[2]);
        *at(kept, slot * n + u) = c;
        *at(kept, (steps + 1 + t) * n + u) = (float)tanh_of(c);
        *at(h, slot * n + u) = *gate[3] * (float)tanh_of(c);
    } else if (gates == 3) {
        *gate[0] = (float)sigmoid_of(*gate[0] + sum[0]), *gate[1] = (float)sigmoid_of(*gate[1] + sum[1]);
        *gate[2] = (float)tanh_of(fmaf(*gate[0], sum[2], *gate[2]));
        *at(kept, (t * 3 + 2) * n + u) = sum[2];
        *at(h, slot * n + u) =
            fmaf(*gate[1], *at(h, before * n + u) - *gate[2], *gate[2]);
    } else {
        float y = *gate[0] + sum[0];
        *at(h, slot * n + u) = op->flags & OP_RELU ? (y <= 0 ? 0 : y) : (float)tanh_of(y);
    }
}

static void forward(const Op *op, const Call *call, int64_t gates, int64_t s) {
    int64_t steps = op->i[4], n = op->i[5], is_back = op->flags & OP_REVERSED;
    Column h = column(call, op->i[1], (steps + 1) * n, s);
    Column kept = column(call, op->i[2], kept_rows(gates, steps, n), s);
    for (int64_t u = 0; u < n; u++) {
        int64_t first = (is_back ? steps : 0) * n + u;
        *at(h, first) = op->i[8] < 0 ? 0 : *at(column(call, op->i[8], n, s), u);
        if (gates == 4)
            *at(kept, first) = op->i[9] < 0 ? 0 : *at(column(call, op->i[9], n, s), u);
    }
    for (int64_t j = 0; j < steps; j++)
        for (int64_t u = 0; u < n; u++)
            unit_forward(op, call, gates, is_back ? steps - 1 - j : j, s, u);
}

/* One unit: from the gradient dh of its state and what its cell carries. */
static void unit_back(const Op *op, const Call *call, int64_t gates, int64_t t,
                      int64_t s, int64_t u, float dh, float *carried) {
    int64_t steps = op->i[5], n = op->i[6], slot = t + 1, before = t;
    if (op->flags & OP_REVERSED) slot = t, before = t + 1;
    Column a = column(call, op->i[1], steps * gates * n, s);
    Column h = column(call, op->i[2], (steps + 1) * n, s);
    Column kept = column(call, op->i[3], kept_rows(gates, steps, n), s);
    float *z[4], y = *at(h, slot * n + u);
    for (int64_t g = 0; g < gates; g++) z[g] = at(a, (t * gates + g) * n + u);
    if (gates == 4) {
        float i = *z[0], f = *z[1], g = *z[2], o = *z[3];
        float v = *at(kept, (steps + 1 + t) * n + u);
        float dc = fmaf(dh * o, fmaf(-v, v, 1), *carried);
        *z[0] = tiny((dc * g) * (i * (1 - i)));
        *z[1] = tiny((dc * *at(kept, before * n + u)) * (f * (1 - f)));
        *z[2] = tiny((dc * i) * fmaf(-g, g, 1));
        *z[3] = tiny((dh * v) * (o * (1 - o)));
        *carried = tiny(dc * f);
    } else if (gates == 3) {
        float r = *z[0], w = *z[1], m = *z[2], *sum[3];
        for (int64_t g = 0; g < 3; g++) sum[g] = at(kept, (t * 3 + g) * n + u);
        float dm = tiny((dh * (1 - w)) * fmaf(-m, m, 1));
        *z[0] = *sum[0] = tiny((dm * *sum[2]) * (r * (1 - r)));
        *z[1] = *sum[1] = tiny((dh * (*at(h, before * n + u) - m)) * (w * (1 - w)));
        *z[2] = dm;
        *sum[2] = tiny(dm * r);
        *carried = tiny(dh * w);
    } else if (op->flags & OP_RELU) {
        *z[0] = tiny(y <= 0 ? 0 : dh);
    } else {
        *z[0] = tiny(dh * fmaf(-y, y, 1));
    }
}

static void backward(const Op *op, const Call *call, int64_t gates, int64_t s) {
    int64_t steps = op->i[5], n = op->i[6], only = op->i[8], given = OP_LAST_STATE;
    int64_t is_back = op->flags & OP_REVERSED;
    Column dy = column(call, op->i[0], (only < 0 ? steps : 1) * n, s);
    Column dz = column(call, gates == 3 ? op->i[3] : op->i[1], steps * gates * n, s);
    Column state = column(call, op->i[9], n, s), cell = column(call, op->i[10], n, s);
    float *later = calloc(n, sizeof(float)), *carried = calloc(n, sizeof(float));
    for (int64_t u = 0; u < n; u++) {
        if (state.buffers && op->flags & given) later[u] = *at(state, u);
        if (cell.buffers && op->flags & given) carried[u] = *at(cell, u);
    }
    for (int64_t j = steps - 1; j >= 0; j--) {
        int64_t t = is_back ? steps - 1 - j : j;
        for (int64_t u = 0; u < n; u++) {
            float dh = gates == 3 ? carried[u] + later[u] : later[u];
            if (dy.buffers && (only < 0 || only == t))
                dh = *at(dy, (only < 0 ? t * n : 0) + u) + dh;
            unit_back(op, call, gates, t, s, u, dh, carried + u);
        }
        for (int64_t u = 0; u < n; u++)
            later[u] = product(call->parameters + op->i[7] + u, n, dz, t * gates * n,
                               gates * n);
    }
    for (int64_t u = 0; u < n; u++) {
        if (state.buffers)
            *at(state, u) = gates == 3 ? carried[u] + later[u] : later[u];
        if (cell.buffers) *at(cell, u) = carried[u];
    }
    free(later), free(carried);
}

void recurrent_run(const Op *op, const Call *call) {
    for (int64_t s = 0; s < call->starts[call->micro_batches]; s++)
        (op->kind >= OP_LSTM_GRAD ? backward : forward)(op, call, gates_of(op), s);
}
