/* docs/arithmetic.md for layers at positions: products, sums over rows, LayerNorm, and
 * functions row by row. */
#include "reference_pointwise.c"

static float product(const float *a, const float *b, int64_t n) {
    float sum = 0;
    for (int64_t first = 0; first < n; first += 256) {
        float block = 0;
        for (int64_t k = first; k < n && k < first + 256; k++)
            block = fmaf(a[k], b[k], block);
        sum = first ? sum + block : block;
    }
    return sum;
}

/* Feature f of position p; `place` are rows, first row and step. */
static float *at_position(At call, int64_t buffer, const int64_t *place, int64_t p,
                          int64_t f, int64_t s) {
    return by_feature(call, buffer, place[0], place[1] + p * place[2] + f, s);
}

static void linear(In op, At call, int64_t p, int64_t s) {
    const int64_t *i = op->i, in = i[2], out = i[3];
    float x[in];
    for (int64_t k = 0; k < in; k++) x[k] = *at_position(call, i[0], i + 8, p, k, s);
    for (int64_t o = 0; o < out; o++) {
        float y = product(call->parameters + i[4] + o * in, x, in);
        if (i[5] >= 0) y += call->parameters[i[5] + o];
        *at_position(call, i[1], i + 11, p, o, s) =
            activated(op, call, y, s, p * out + o, i[7] * out, i[6], op->f[0]);
    }
}
static void linear_grad_input(In op, At call, int64_t p, int64_t s) {
    const int64_t *i = op->i, in = i[2], out = i[3];
    float dy[out], column[out];
    for (int64_t k = 0; k < in; k++) {
        for (int64_t o = 0; o < out; o++) {
            dy[o] = *at_position(call, i[0], i + 7, p, o, s);
            column[o] = call->parameters[i[4] + o * in + k];
        }
        float dx = product(column, dy, out);
        if (i[5] >= 0 && op->flags & OP_SLOPE)
            dx = dx * *at_position(call, i[5], i + 10, p, k, s);
        else if (i[5] >= 0)
            dx = gate_of(dx, *at_position(call, i[5], i + 10, p, k, s), op->f[0]);
        *at_position(call, i[1], i + 10, p, k, s) = dx;
    }
}
static void linear_grad_weight(In op, At call) {
    const int64_t *i = op->i, in = i[2], out = i[3], positions = i[5];
    float values[call->micro_batches];
    for (int64_t o = 0; o < out; o++)
        for (int64_t k = 0; k < in; k++) {
            for (int64_t m = 0; m < call->micro_batches; m++) {
                int64_t start = call->starts[m], b = call->starts[m + 1] - start, n = 0;
                float dy[positions * b + 1], x[positions * b + 1];
                for (int64_t p = 0; p < positions; p++)
                    for (int64_t s = start; s < start + b; s++, n++) {
                        int64_t row = i[10] + p * i[11];
                        dy[n] = *at_position(call, i[0], i + 6, p, o, s);
                        x[n] = call->buffers[i[1]][(k / 32 * i[9] + row) *
                                                       call->capacity * 32 +
                                                   s * 32 + k % 32];
                    }
                values[m] = product(dy, x, n);
            }
            into_slots(call, i[4] + o * in + k, values);
        }
}
static void transpose(In op, At call, int64_t p, int64_t s) {
    const int64_t *i = op->i;
    for (int64_t f = 0; f < i[2]; f++)
        call->buffers[i[1]][(f / 32 * i[3] + p) * call->capacity * 32 + s * 32 +
                            f % 32] = *at_position(call, i[0], i + 4, p, f, s);
}

static void layer_norm(In op, At call, int64_t p, int64_t s) {
    const int64_t *i = op->i, features = i[4], one[] = {i[5], 0, 1};
    float x[features], squares[features];
    for (int64_t f = 0; f < features; f++)
        x[f] = *at_position(call, i[0], i + 6, p, f, s);
    float mean = chain(x, features) / (float)features;
    for (int64_t f = 0; f < features; f++) squares[f] = (x[f] - mean) * (x[f] - mean);
    float inverse = 1 / sqrtf(chain(squares, features) / (float)features + op->f[0]);
    for (int64_t f = 0; f < features; f++) {
        float y = (x[f] - mean) * inverse;
        if (i[12] >= 0 && i[13] >= 0)
            y = fmaf(y, call->parameters[i[12] + f], call->parameters[i[13] + f]);
        else if (i[12] >= 0)
            y = y * call->parameters[i[12] + f];
        *at_position(call, i[1], i + 9, p, f, s) = y;
    }
    *at_position(call, i[2], one, p, 0, s) = mean;
    *at_position(call, i[3], one, p, 0, s) = inverse;
}
static void layer_norm_grad(In op, At call, int64_t p, int64_t s) {
    const int64_t *i = op->i, features = i[6], one[] = {i[7], 0, 1};
    float mean = *at_position(call, i[3], one, p, 0, s);
    float inverse = *at_position(call, i[4], one, p, 0, s);
    float g[features], z[features], products[features];
    for (int64_t f = 0; f < features; f++) {
        g[f] = *at_position(call, i[0], i + 8, p, f, s);
        if (i[17] >= 0) g[f] *= call->parameters[i[17] + f];
        z[f] = (*at_position(call, i[2], i + 14, p, f, s) - mean) * inverse;
        products[f] = g[f] * z[f];
    }
    float a = chain(g, features) / (float)features;
    float c = chain(products, features) / (float)features;
    for (int64_t f = 0; f < features; f++)
        *at_position(call, i[1], i + 11, p, f, s) = inverse * ((g[f] - a) - z[f] * c);
}
static void layer_norm_sums(In op, At call, int64_t s) {
    const int64_t *i = op->i, features = i[6], positions = i[7];
    const int64_t one[] = {positions, 0, 1};
    float dy[positions], products[positions];
    for (int64_t f = 0; f < features && i[5] >= 0; f++) {
        for (int64_t p = 0; p < positions; p++) {
            float x = *at_position(call, i[2], i + 14, p, f, s);
            float mean = *at_position(call, i[3], one, p, 0, s);
            dy[p] = *at_position(call, i[0], i + 8, p, f, s);
            products[p] = dy[p] * ((x - mean) * *at_position(call, i[4], one, p, 0, s));
        }
        *by_feature(call, i[5], 2 * features, f, s) = chain(products, positions);
        *by_feature(call, i[5], 2 * features, features + f, s) = chain(dy, positions);
    }
}

/* 2^x, with G and E2 of the page. */
static float exp2_of(float x) {
    static const float E2[] = {1,
                               0x1.62e43p-1f,
                               0x1.ebfbep-3f,
                               0x1.c6aeccp-5f,
                               0x1.3b29d8p-7f,
                               0x1.5f48c8p-10f,
                               0x1.446c7ep-13f};
    float n = (x + 0x1.8p23f) - 0x1.8p23f, sum = E2[6];
    for (int k = 5; k >= 0; k--) sum = fmaf(sum, x - n, E2[k]);
    return isnan(x) ? x : sum * (float)exp2(n);
}
static float normal_of(float x) {
    static const float G[] = {0x1.26aecep+0f,   0x1.d63c5cp-2f,   0x1.adc442p-5f,
                              -0x1.c95fa6p-8f,  0x1.cc4886p-16f,  0x1.16e2a2p-12f,
                              -0x1.2f8df4p-14f, 0x1.580f68p-17f,  -0x1.a901e4p-21f,
                              0x1.c2387ep-26f};
    float t = fabsf(x), sum = G[9];
    if (t > 5.7f) return x < 0 ? 0 : 1;
    for (int k = 8; k >= 0; k--) sum = fmaf(sum, t, G[k]);
    float tail = exp2_of(fmaf(-t, sum, -1));
    return x < 0 ? tail : 1 - tail;
}
static float gelu_slope(float x) {
    float t = fabsf(x), density = 0;
    if (!(t > 13))
        density = exp2_of(fmaf(t * t, -0x1.715476p-1f, -0x1.53643ap+0f));
    return fmaf(x, density, normal_of(x));
}
static float gelu_tanh_part(float x) {
    return (float)tanh_of(x * fmaf(x * x, 0x1.2444f2p-5f, 0x1.988454p-1f));
}

static void draw(In op, At call, int64_t s) {
    for (int64_t f = 0; f < op->i[1]; f++) {
        uint32_t bits = drawn(call, s, f, op->i[1], op->i[2]) >> 8;
        *by_feature(call, op->i[0], op->i[1], f, s) = (float)bits * 0x1p-24f + op->f[0];
    }
}

static void combine(In op, At call, int64_t s) {
    const int64_t *i = op->i;
    const int32_t *ends = (const int32_t *)weights_at(call, i[4]);
    const int32_t *terms = (const int32_t *)weights_at(call, i[5]);
    const float *weights = i[6] == -1 ? NULL : weights_at(call, i[6]);
    for (int64_t r = 0; r < i[3]; r++) {
        int64_t count = ends[r + 1] - ends[r];
        float x[count + 1];
        for (int64_t k = 0; k < count; k++)
            x[k] = *by_feature(call, i[0], i[2], terms[ends[r] + k], s);
        float y = weights      ? 0.0f + product(weights + ends[r], x, count)
                  : count == 1 ? x[0]
                               : chain(x, count);
        *by_feature(call, i[1], i[3], r, s) = y;
    }
}

static float unary(int64_t function, float x, const float *f) {
    switch (function) {
    case UNARY_FILL: return f[0];
    case UNARY_NEG: return -x;
    case UNARY_ABS: return fabsf(x);
    case UNARY_RECIPROCAL: return 1 / x;
    case UNARY_SQRT: return sqrtf(x);
    case UNARY_RSQRT: return 1 / sqrtf(x);
    case UNARY_EXP: return (float)exp_of(x);
    case UNARY_LOG: return (float)log_of(x);
    case UNARY_TANH: return (float)tanh_of(x);
    case UNARY_SIGMOID: return (float)sigmoid_of(x);
    case UNARY_ERF: return (float)erf_of(x);
    case UNARY_SIN: return (float)sin_of(x);
    case UNARY_COS: return (float)cos_of(x);
    case UNARY_GELU:
    case UNARY_GELU_SLOPE: return x * normal_of(x);
    case UNARY_GELU_TANH: return (0.5f * x) * (1 + gelu_tanh_part(x));
    case UNARY_SILU: return x * (float)sigmoid_of(x);
    case UNARY_EXPM1: return (float)expm1_of(cut(x, -110, 110));
    case UNARY_LOG1P: return (float)log1p_of(x);
    default: return x;
    }
}
static float binary(int64_t function, float a, float b) {
    float y = function == BINARY_GELU_TANH_GRAD ? gelu_tanh_part(b)
              : function == BINARY_SILU_GRAD    ? (float)sigmoid_of(b)
                                                : b;
    switch (function) {
    case BINARY_MAX: return a > b || isnan(a) ? a : b;
    case BINARY_MIN: return a < b || isnan(a) ? a : b;
    case BINARY_GREATER: return a > b;
    case BINARY_AT_LEAST: return a >= b;
    case BINARY_LESS: return a < b;
    case BINARY_AT_MOST: return a <= b;
    case BINARY_EQUAL: return a == b;
    case BINARY_WHERE: return b != 0 ? a : 0;
    case BINARY_WHERE_NOT: return b != 0 ? 0 : a;
    case BINARY_ADD: return a + b;
    case BINARY_SUB: return a - b;
    case BINARY_MUL: return a * b;
    case BINARY_TANH_GRAD: return a * (1 - b * b);
    case BINARY_SIGMOID_GRAD: return a * (b * (1 - b));
    case BINARY_GELU_GRAD: return a * gelu_slope(b);
    case BINARY_GELU_TANH_GRAD:
        return a * fmaf((0.5f * b) * (1 - y * y),
                        fmaf(b * b, 0x1.b6676cp-4f, 0x1.988454p-1f), 0.5f * (1 + y));
    case BINARY_SILU_GRAD: return a * (y * fmaf(b, 1 - y, 1));
    default: return a / b;
    }
}

/* Where index n of row-major axes lies. */
static int64_t row_at(int64_t n, const int64_t *sizes, const int64_t *strides,
                      int axes) {
    int64_t row = 0;
    for (int axis = axes - 1; axis >= 0; n /= sizes[axis--])
        row += n % sizes[axis] * strides[axis];
    return row;
}
static int64_t count(const int64_t *sizes, int axes) {
    int64_t n = 1;
    for (int axis = 0; axis < axes; axis++) n *= sizes[axis];
    return n;
}

static void pointwise(In op, At call, int64_t s) {
    const int64_t *i = op->i, *sizes = i + (op->kind == OP_UNARY ? 7 : 8);
    int64_t rows = count(sizes, AXES);
    for (int64_t n = 0; n < rows; n++) {
        int64_t x = row_at(n, sizes, sizes + AXES, AXES);
        int64_t other = row_at(n, sizes, sizes + 2 * AXES, AXES);
        if (op->kind == OP_UNARY) {
            float *at = by_feature(call, i[0], i[3], i[4] + x, s), before = *at;
            if (i[2] == UNARY_GELU_SLOPE) *at = gelu_slope(before);
            *by_feature(call, i[1], i[5], i[6] + other, s) =
                unary(i[2], before, op->f);
            continue;
        }
        float b = i[2] == -1   ? call->parameters[i[7] + other]
                  : i[2] == -2 ? op->f[0]
                               : *by_feature(call, i[2], i[6], i[7] + other, s);
        *by_feature(call, i[1], rows, n, s) =
            binary(i[3], *by_feature(call, i[0], i[4], i[5] + x, s), b);
    }
}
static void sum_rows(In op, At call, int64_t s) {
    const int64_t *i = op->i;
    int64_t rows = count(i + 4, 2), terms = count(i + 6, 2);
    float x[terms];
    for (int64_t n = 0; n < rows; n++) {
        int64_t first = i[3] + row_at(n, i + 4, i + 8, 2);
        for (int64_t k = 0; k < terms; k++)
            x[k] = *by_feature(call, i[0], i[2],
                               first + row_at(k, i + 6, i + 10, 2), s);
        *by_feature(call, i[1], rows, n, s) = chain(x, terms) / op->f[0];
    }
}

static void matmul(In op, At call, int64_t s) {
    const int64_t *i = op->i, width = i[9], terms = i[10];
    float a[terms], b[terms];
    for (int64_t n = 0; n < i[7] * i[8] * width; n++) {
        int64_t g = n / width / i[8], row = n / width % i[8], column = n % width;
        for (int64_t k = 0; k < terms; k++) {
            int64_t of_a = i[4] + g * i[11] + row * i[12] + k * i[13];
            int64_t of_b = i[6] + g * i[14] + k * i[15] + column * i[16];
            a[k] = *by_feature(call, i[0], i[3], of_a, s);
            b[k] = *by_feature(call, i[2], i[5], of_b, s);
        }
        *by_feature(call, i[1], i[7] * i[8] * width, n, s) = product(a, b, terms);
    }
}
static void softmax(In op, At call, int64_t s) {
    const int64_t *i = op->i, terms = i[3];
    float e[terms];
    for (int64_t first = 0; first < i[2]; first += terms) {
        float top = -INFINITY;
        for (int64_t k = 0; k < terms; k++) {
            float x = *by_feature(call, i[0], i[2], first + k, s);
            if (x > top || isnan(x)) top = x;
        }
        for (int64_t k = 0; k < terms; k++)
            e[k] = (float)exp_of(*by_feature(call, i[0], i[2], first + k, s) - top);
        for (int64_t k = 0; k < terms; k++)
            *by_feature(call, i[1], i[2], first + k, s) =
                i[4] && top == -INFINITY ? 0 : e[k] / chain(e, terms);
    }
}

void reference_tokens(In op, At call) {
    int64_t positions = op->kind == OP_LINEAR              ? op->i[7]
                        : op->kind == OP_LINEAR_GRAD_INPUT ? op->i[6]
                        : op->kind == OP_TRANSPOSE         ? op->i[3]
                        : op->kind == OP_LAYER_NORM        ? op->i[5]
                        : op->kind == OP_LAYER_NORM_GRAD   ? op->i[7]
                                                           : 1;
    if (op->kind == OP_LINEAR_GRAD_WEIGHT) linear_grad_weight(op, call);
    for (int64_t s = 0; s < samples_of(call); s++) {
        if (op->kind == OP_LAYER_NORM_GRAD) layer_norm_sums(op, call, s);
        for (int64_t p = 0; p < positions; p++) switch (op->kind) {
            case OP_LINEAR: linear(op, call, p, s); break;
            case OP_LINEAR_GRAD_INPUT: linear_grad_input(op, call, p, s); break;
            case OP_TRANSPOSE: transpose(op, call, p, s); break;
            case OP_LAYER_NORM: layer_norm(op, call, p, s); break;
            case OP_LAYER_NORM_GRAD: layer_norm_grad(op, call, p, s); break;
            case OP_MATMUL: matmul(op, call, s); break;
            case OP_SOFTMAX: softmax(op, call, s); break;
            case OP_DRAW: draw(op, call, s); break;
            case OP_COMBINE: combine(op, call, s); break;
            case OP_SUM_ROWS: sum_rows(op, call, s); break;
            case OP_UNARY:
            case OP_BINARY: pointwise(op, call, s); break;
        }
    }
}
