/* docs/arithmetic.md, one element after the other, as plainly as it can be written:
 * what the kernels are compared with, bit for bit. */
#include "reference_functions.h"
#include "samestep.h"

typedef const Op *In;
typedef const Call *At;

/* Element (feature, sample) of a matrix by feature, and (sample, feature) by sample. */
static float *by_feature(At call, int64_t buffer, int64_t features, int64_t f,
                         int64_t s) {
    return call->buffers[buffer] + s / 32 * features * 32 + f * 32 + s % 32;
}
static float *by_sample(At call, int64_t buffer, int64_t f, int64_t s) {
    return call->buffers[buffer] + f / 32 * call->capacity * 32 + s * 32 + f % 32;
}
static int64_t samples_of(At call) { return call->starts[call->micro_batches]; }

static float chain(const float *x, int64_t n) {
    float sum = 0;
    for (int64_t first = 0; first < n; first += 256) {
        float block = 0;
        for (int64_t i = first; i < n && i < first + 256; i++) block += x[i];
        sum += block;
    }
    return sum;
}
static float tree_of_lanes(float lanes[16]) {
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] = lanes[l] + lanes[l + half];
    return lanes[0];
}
static float reduction(const float *x, int64_t n) {
    float sum = 0;
    for (int64_t first = 0; first < n; first += 256) {
        float lanes[16] = {0};
        for (int64_t i = first; i < n && i < first + 256; i++) lanes[i % 16] += x[i];
        sum += tree_of_lanes(lanes);
    }
    return sum;
}
/* Values of all micro-batches, up the tree into the slots. */
static void into_slots(At call, int64_t place, const float *values) {
    float stack[call->micro_batches];
    int64_t size = 0;
    for (int64_t m = 0; m < call->micro_batches; m++) {
        stack[size++] = values[m];
        for (int64_t j = 0; j < call->merges[m]; j++, size--)
            stack[size - 2] += stack[size - 1];
    }
    for (int64_t j = 0; j < size; j++) call->slots[j][place] = stack[j];
}

/* ReLU and dropout. */
static uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= x >> 15;
    x *= 0x735A2D97u;
    return x ^ x >> 15;
}
static int64_t micro_batch(At call, int64_t s) {
    int64_t m = 0;
    while (call->starts[m + 1] <= s) m++;
    return m;
}
static uint32_t drawn(At call, int64_t s, int64_t f, int64_t width, int64_t stream) {
    int64_t m = micro_batch(call, s);
    uint64_t e = (uint64_t)((s - call->starts[m]) * width + f), key = call->keys[m];
    uint32_t x = mix((uint32_t)(e * 0x9E3779B9u + key));
    return mix(x ^ (uint32_t)((key >> 32) + (uint64_t)stream * 0x85EBCA6Bu));
}
static float activated(In op, At call, float y, int64_t s, int64_t f, int64_t width,
                       int64_t stream, float p) {
    if (op->flags & OP_RELU && y <= 0) y = 0;
    if (!(op->flags & OP_DROPOUT)) return y;
    if (drawn(call, s, f, width, stream) < round((double)p * 0x1p32)) return 0;
    return y * (float)(1 / (1 - (double)p));
}
static float gate_of(float dy, float gate, float factor) {
    return gate <= 0 ? 0 : dy * factor;
}

static void activate(In op, At call) {
    int64_t features = op->i[2];
    for (int64_t s = 0; s < samples_of(call); s++)
        for (int64_t f = 0; f < features; f++)
            *by_feature(call, op->i[1], features, f, s) =
                activated(op, call, *by_feature(call, op->i[0], features, f, s), s, f,
                          features, op->i[3], op->f[0]);
}
static void gate(In op, At call) {
    int64_t features = op->i[3];
    for (int64_t s = 0; s < samples_of(call); s++)
        for (int64_t f = 0; f < features; f++)
            *by_feature(call, op->i[1], features, f, s) =
                gate_of(*by_feature(call, op->i[0], features, f, s),
                        *by_feature(call, op->i[2], features, f, s), op->f[0]);
}
static void store(In op, At call) {
    for (int64_t s = 0; s < samples_of(call); s++)
        for (int64_t f = 0; f < op->i[1]; f++)
            call->outputs[s * op->i[1] + f] =
                *by_feature(call, op->i[0], op->i[1], f, s);
}

/* Inputs. */
static void place(In op, At call, int64_t features, int64_t f, int64_t s, float x) {
    if (op->i[0] >= 0 && f < features)
        *by_feature(call, op->i[0], features, f, s) = x;
    if (op->i[1] >= 0 && s < samples_of(call)) *by_sample(call, op->i[1], f, s) = x;
}
static void gather(In op, At call) {
    int64_t features = op->i[2], n = samples_of(call);
    for (int64_t s = 0; s < (n + 31) / 32 * 32; s++)
        for (int64_t f = 0; f < (features + 31) / 32 * 32; f++) {
            float x = 0;
            if (s < n && f < features && op->kind == OP_LOAD)
                x = call->inputs[s * features + f];
            if (s < n && f < features && op->kind == OP_GATHER_BYTES) {
                int64_t channel = f / (features / op->i[3]);
                x = (float)call->bytes[call->indices[s] * features + f] *
                    call->buffers[op->i[4]][channel];
                x = x - call->buffers[op->i[5]][channel];
            }
            place(op, call, features, f, s, x);
        }
}

/* BatchNorm. */
static void batch_norm_feature(In op, At call, int64_t f) {
    int64_t features = op->i[4], count = call->micro_batches;
    float means[count], variances[count];
    float old_mean = call->running[op->i[7] + f];
    float old_variance = call->running[op->i[8] + f];
    float weight = call->parameters[op->i[5] + f];
    float bias = call->parameters[op->i[6] + f];
    for (int64_t m = 0; m < count; m++) {
        int64_t start = call->starts[m], b = call->starts[m + 1] - start;
        float x[b + 1], d[b + 1], squares[b + 1];
        for (int64_t s = 0; s < b; s++)
            x[s] = *by_feature(call, op->i[0], features, f, start + s);
        int is_eval = op->flags & OP_EVAL;
        float mean = is_eval ? old_mean : reduction(x, b) / b;
        for (int64_t s = 0; s < b; s++) d[s] = x[s] - mean, squares[s] = d[s] * d[s];
        float variance = is_eval ? old_variance : reduction(squares, b) / b;
        float inverse = 1 / sqrtf(variance + op->f[0]);
        for (int64_t s = 0; s < b; s++) {
            float z = d[s] * inverse;
            if (!is_eval) *by_feature(call, op->i[2], features, f, start + s) = z;
            *by_feature(call, op->i[1], features, f, start + s) =
                activated(op, call, fmaf(z, weight, bias), start + s, f, features,
                          op->i[11], op->f[2]);
        }
        if (!is_eval && b) call->buffers[op->i[3]][m * features + f] = inverse;
        float unbiased = b > 1 ? variance * (float)((double)b / (b - 1)) : 0;
        means[m] = b ? fmaf(op->f[1], mean - old_mean, old_mean) : old_mean;
        variances[m] =
            b ? fmaf(op->f[1], unbiased - old_variance, old_variance) : old_variance;
    }
    if (op->flags & OP_EVAL) return;
    into_slots(call, call->tail + op->i[9] + f, means);
    into_slots(call, call->tail + op->i[10] + f, variances);
}
static void batch_norm_grad_feature(In op, At call, int64_t f) {
    int64_t features = op->i[5], count = call->micro_batches;
    float weights[count], biases[count];
    for (int64_t m = 0; m < count; m++) {
        int64_t start = call->starts[m], b = call->starts[m + 1] - start;
        float g[b + 1], z[b + 1], products[b + 1];
        for (int64_t s = 0; s < b; s++) {
            g[s] = *by_feature(call, op->i[0], features, f, start + s);
            if (op->i[2] >= 0)
                g[s] = gate_of(g[s],
                               *by_feature(call, op->i[2], features, f, start + s),
                               op->f[0]);
            z[s] = *by_feature(call, op->i[3], features, f, start + s);
            products[s] = g[s] * z[s];
        }
        biases[m] = reduction(g, b), weights[m] = reduction(products, b);
        if (!b) continue;
        float inverse = call->buffers[op->i[4]][m * features + f];
        float scale = call->parameters[op->i[6] + f] * inverse;
        for (int64_t s = 0; s < b; s++)
            *by_feature(call, op->i[1], features, f, start + s) =
                scale * ((g[s] - biases[m] / b) - z[s] * (weights[m] / b));
    }
    if (op->i[7] >= 0) into_slots(call, op->i[7] + f, weights);
    if (op->i[8] >= 0) into_slots(call, op->i[8] + f, biases);
}

/* Losses. */
static void sum_losses(At call, int64_t positions) {
    for (int64_t m = 0; m < call->micro_batches; m++) {
        call->loss_sums[m] = call->metric_sums[m] = 0;
        for (int64_t s = call->starts[m] * positions;
             s < call->starts[m + 1] * positions; s++) {
            call->loss_sums[m] += call->losses[s];
            call->metric_sums[m] += call->metrics[s];
        }
    }
}
static float softmax_term(float x, float top) {
    float d = x - top, y;
    if (d < -64) return 0;
    reference_function(0, &d, &y, 1);
    return y;
}
static void cross_entropy_sample(In op, At call, int64_t s, int64_t p, int64_t n) {
    int64_t classes = op->i[2], t = call->labels[s * n + p], answer = 0;
    float x[classes], e[classes], terms[classes], l, a = op->f[0];
    for (int64_t c = 0; c < classes; c++) {
        x[c] = *by_feature(call, op->i[0], n * classes, p * classes + c, s);
        if (!isnan(x[answer]) && (isnan(x[c]) || x[c] > x[answer])) answer = c;
    }
    float top = x[answer];
    for (int64_t c = 0; c < classes; c++) e[c] = softmax_term(x[c], top);
    float total = reduction(e, classes), own = (float)(1 - (double)a);
    reference_function(1, &total, &l, 1);
    for (int64_t c = 0; c < classes; c++) terms[c] = l + (top - x[c]);
    int is_ignored = t == op->i[3], is_class = t >= 0 && t < classes;
    float even = (float)((double)a / classes), loss = is_class ? terms[t] : NAN;
    int64_t partner = call->partners ? call->partners[s] : -1;
    float share = call->partners ? call->shares[s] : 1;
    if (call->partners) loss = fmaf(share, loss, (1 - share) * terms[partner]);
    if (a != 0) loss = fmaf(own, loss, even * reduction(terms, classes));
    call->losses[s * n + p] = is_ignored ? 0 : loss;
    call->metrics[s * n + p] = !is_ignored && answer == t;
    if (call->answers) call->answers[s * n + p] = answer;
    for (int64_t c = 0; c < classes && op->i[1] >= 0; c++) {
        float q = c == t ? fmaf(own, share, even) : even;
        if (c == partner) q = fmaf(own, 1 - share, q);
        float dx = (e[c] / total - q) * call->weight;
        if (fabsf(dx) < 0x1p-64f) dx = 0;
        if (!is_class) dx = NAN;
        *by_feature(call, op->i[1], n * classes, p * classes + c, s) =
            is_ignored ? 0 : dx;
    }
}
static void squared_error_sample(In op, At call, int64_t s) {
    int64_t values = op->i[2];
    float squares[values], errors[values];
    for (int64_t v = 0; v < values; v++) {
        float d = *by_feature(call, op->i[0], values, v, s);
        d = d - call->targets[s * values + v];
        squares[v] = d * d, errors[v] = fabsf(d);
        if (op->i[1] >= 0) *by_feature(call, op->i[1], values, v, s) = d * call->weight;
    }
    call->losses[s] = reduction(squares, values) / 2;
    call->metrics[s] = reduction(errors, values);
}

void reference_run(In op, At call) {
    int64_t samples = samples_of(call);
    switch (op->kind) {
        case OP_GATHER_BYTES:
        case OP_LOAD: gather(op, call); break;
        case OP_ACTIVATE: activate(op, call); break;
        case OP_GATE: gate(op, call); break;
        case OP_STORE: store(op, call); break;
        case OP_BATCH_NORM:
            for (int64_t f = 0; f < op->i[4]; f++) batch_norm_feature(op, call, f);
            break;
        case OP_BATCH_NORM_GRAD:
            for (int64_t f = 0; f < op->i[5]; f++) batch_norm_grad_feature(op, call, f);
            break;
        case OP_CROSS_ENTROPY:
            for (int64_t s = 0; s < samples; s++)
                for (int64_t p = 0, n = op->i[4] ? op->i[4] : 1; p < n; p++)
                    cross_entropy_sample(op, call, s, p, n);
            sum_losses(call, op->i[4] ? op->i[4] : 1);
            break;
        case OP_SQUARED_ERROR:
            for (int64_t s = 0; s < samples; s++) squared_error_sample(op, call, s);
            sum_losses(call, 1);
            break;
    }
}

/* From a gradient to new weights. */
static float summed(const float *const *leaves, const int32_t *order, int64_t size,
                    int64_t i) {
    float stack[size + 1];
    int64_t height = 0;
    for (int64_t j = 0; j < size; j++) {
        if (order[j] < 0) {
            height--;
            stack[height - 1] += stack[height];
        } else {
            stack[height++] = leaves[order[j]][i];
        }
    }
    return stack[0];
}
void reference_tree_sum(float *out, const float *const *leaves, const int32_t *order,
                        int64_t order_size, int64_t size) {
    for (int64_t i = 0; i < size; i++) out[i] = summed(leaves, order, order_size, i);
}
static float tiny(float x, float bound) { return fabsf(x) < bound ? 0 : x; }
void reference_update(const Optimizer *how, const float *const *leaves,
                      const int32_t *order, int64_t order_size, float *p, float *state1,
                      float *state2, int64_t size) {
    for (int64_t i = 0; i < size; i++) {
        float g = summed(leaves, order, order_size, i);
        if (how->kind != ADAMW && how->weight_decay != 0)
            g = fmaf(how->weight_decay, p[i], g);
        if (how->kind == SGD) {
            float d = g;
            if (how->beta1 != 0) {
                float m = how->is_first ? g : fmaf(how->beta1, state1[i], g);
                state1[i] = m;
                d = how->nesterov ? fmaf(how->beta1, m, g) : m;
            }
            p[i] = fmaf(-how->lr, d, p[i]);
            continue;
        }
        g = tiny(g, 0x1p-62f);
        float m = fmaf(how->one_minus_beta1, g - state1[i], state1[i]);
        float v = fmaf(how->one_minus_beta2, g * g - state2[i], state2[i]);
        state1[i] = m = tiny(m, 0x1p-100f), state2[i] = v = tiny(v, 0x1p-100f);
        if (how->kind == ADAMW) p[i] = p[i] * how->weight_decay;
        p[i] = fmaf(-how->lr, m / fmaf(sqrtf(v), how->root, how->eps), p[i]);
    }
}
void reference_average(float *average, const float *p, float weight, int64_t size) {
    for (int64_t i = 0; i < size; i++)
        average[i] = fmaf(weight, p[i] - average[i], average[i]);
}
void reference_squared_norms(const float *vector, double *squares, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) {
        double lanes[16] = {0};
        for (int64_t i = 0; i < 1024; i++)
            lanes[i % 16] += (double)vector[b * 1024 + i] * vector[b * 1024 + i];
        for (int half = 8; half; half /= 2)
            for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
        squares[b] = lanes[0];
    }
}
