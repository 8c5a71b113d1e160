/* The products of a linear layer. */

INLINE int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

/* Sum over k of a[k * step] * b[k * PANEL + 0..VW-1], in blocks of K_BLOCK. */
static vf chain(const float *a, int64_t step, const float *b, int64_t n) {
    vf total = {0};
    for (int64_t k0 = 0; k0 < n; k0 += K_BLOCK) {
        vf sum = {0};
        for (int64_t k = k0; k < n && k < k0 + K_BLOCK; k++)
            sum = fma_(splat(a[k * step]), load(b + k * PANEL), sum);
        total = k0 ? total + sum : sum;
    }
    return total;
}

static void op_linear(const Op *op, const Call *call) {
    const float *x = call->buffers[op->i[0]], *w = call->parameters + op->i[4];
    float *y = call->buffers[op->i[1]];
    int64_t in = op->i[2], out = op->i[3], samples = call->starts[call->micro_batches];
    for (int64_t s = 0; s < samples; s += VW)
        for (int64_t o = 0; o < out; o++) {
            const float *b = x + s / PANEL * in * PANEL + s % PANEL;
            vf v = chain(w + o * in, 1, b, in);
            if (op->i[5] >= 0) v += splat(call->parameters[op->i[5] + o]);
            if (op->flags & OP_RELU) v = relu(v);
            store(y + (s / PANEL * out + o) * PANEL + s % PANEL, v);
        }
}

static void op_linear_grad_input(const Op *op, const Call *call) {
    const float *dy = call->buffers[op->i[0]], *w = call->parameters + op->i[4];
    const float *gate = op->i[5] < 0 ? NULL : call->buffers[op->i[5]];
    float *dx = call->buffers[op->i[1]];
    int64_t in = op->i[2], out = op->i[3], samples = call->starts[call->micro_batches];
    for (int64_t s = 0; s < samples; s += VW)
        for (int64_t i = 0; i < in; i++) {
            int64_t place = (s / PANEL * in + i) * PANEL + s % PANEL;
            vf v = chain(w + i, in, dy + s / PANEL * out * PANEL + s % PANEL, out);
            if (gate) v = keep(~(load(gate + place) <= 0), v * splat(op->f[0]));
            store(dx + place, v);
        }
}

/* One element of a weight's gradient, from samples [first, end). */
static float one_weight(const float *dy, int64_t out, const float *x, int64_t first,
                        int64_t end) {
    float total = 0;
    for (int64_t s0 = first; s0 < end; s0 += K_BLOCK) {
        vf sum = {0};
        for (int64_t s = s0; s < end && s < s0 + K_BLOCK; s++)
            sum = fma_(splat(dy[s / PANEL * out * PANEL + s % PANEL]),
                       splat(x[s * PANEL]), sum);
        total = s0 > first ? total + sum[0] : sum[0];
    }
    return total;
}

static void op_linear_grad_weight(const Op *op, const Call *call) {
    const float *dy = call->buffers[op->i[0]], *x = call->buffers[op->i[1]];
    int64_t in = op->i[2], out = op->i[3];
    for (int64_t o = 0; o < out; o++)
        for (int64_t i = 0; i < in; i++) {
            float sums[64];
            int64_t size = 0;
            for (int64_t m = 0; m < call->micro_batches; m++) {
                sums[size++] = one_weight(
                    dy + o * PANEL, out, x + i / PANEL * call->capacity * PANEL + i % PANEL,
                    call->starts[m], call->starts[m + 1]);
                for (int64_t j = call->merges[m]; j > 0; j--, size--)
                    sums[size - 2] += sums[size - 1];
            }
            for (int64_t j = 0; j < size; j++)
                call->slots[j][op->i[4] + o * in + i] = sums[j];
        }
}

/* The sum of one feature over samples [first, end). */
static float one_bias(const float *dy, int64_t features, int64_t first, int64_t end) {
    float lanes[LANES] = {0};
    for (int64_t s = first; s < end; s++)
        lanes[(s - first) % LANES] += dy[s / PANEL * features * PANEL + s % PANEL];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

static void op_grad_bias(const Op *op, const Call *call) {
    const float *dy = call->buffers[op->i[0]];
    int64_t features = op->i[1];
    for (int64_t f = 0; f < features; f++) {
        float sums[64];
        int64_t size = 0;
        for (int64_t m = 0; m < call->micro_batches; m++) {
            sums[size++] =
                one_bias(dy + f * PANEL, features, call->starts[m], call->starts[m + 1]);
            for (int64_t j = call->merges[m]; j > 0; j--, size--)
                sums[size - 2] += sums[size - 1];
        }
        for (int64_t j = 0; j < size; j++) call->slots[j][op->i[2] + f] = sums[j];
    }
}
