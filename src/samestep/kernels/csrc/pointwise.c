/* Row by row: functions of one and of two operands, and sums over rows. Operands are
 * views of rows with strides, so that permuted and repeated ones need no copy. Only
 * vectors that hold samples are computed. */

/* Up to AXES axes of rows; the inner one is a loop. `first` and `second` are the strides
 * of two operands. */
typedef struct {
    const int64_t *sizes, *first, *second;
    int64_t index[AXES];
} Walk;

/* Go on to the next rows of the inner axis; 0 at the end. */
INLINE int next_rows(Walk *walk, int64_t *first, int64_t *second) {
    for (int axis = AXES - 2; axis >= 0; axis--) {
        *first += walk->first[axis], *second += walk->second[axis];
        if (++walk->index[axis] < walk->sizes[axis]) return 1;
        *first -= walk->sizes[axis] * walk->first[axis];
        *second -= walk->sizes[axis] * walk->second[axis];
        walk->index[axis] = 0;
    }
    return 0;
}

/* Columns of the panel that begins at column `first`, up to the last vector needed. */
INLINE int64_t columns_at(const Call *call, int64_t first) {
    int64_t left = smaller(PANEL, num_samples(call) - first);
    return parts_of(left, VW) * VW;
}

/* The bits of int32 numbers, cut off; -1 for what is none. */
INLINE vf to_int(vf x) {
    vi is_one = (x > -0x1p31f) & (x < 0x1p31f);
    vi whole = __builtin_convertvector(keep(is_one, x), vi);
    return (vf)((whole & is_one) | ~is_one);
}

INLINE vf unary(int64_t function, vf x, const float *f) {
    switch (function) {
    case UNARY_FILL: return splat(f[0]);
    case UNARY_NEG: return -x;
    case UNARY_ABS: return abs_(x);
    case UNARY_RECIPROCAL: return 1 / x;
    case UNARY_SQRT: return sqrt_(x);
    case UNARY_RSQRT: return rsqrt_(x);
    case UNARY_EXP: return exp_(x);
    case UNARY_LOG: return log_(x);
    case UNARY_TANH: return tanh_(x);
    case UNARY_SIGMOID: return sigmoid_(x);
    case UNARY_ERF: return erf_(x);
    case UNARY_SIN: return sin_(x);
    case UNARY_COS: return cos_(x);
    case UNARY_GELU: return gelu_(x);
    case UNARY_GELU_TANH: return gelu_tanh(x);
    case UNARY_SILU: return silu_(x);
    case UNARY_EXPM1: return expm1_(x);
    case UNARY_LOG1P: return log1p_(x);
    case UNARY_FROM_INT: return to_float((vi)x);
    case UNARY_TO_INT: return to_int(x);
    default: return x;
    }
}
/* One where the mask is set, else zero. */
INLINE vf truth(vi mask) { return keep(mask, splat(1)); }
/* a or b; a NaN if one is. */
INLINE vf chosen(vi mask, vf a, vf b) { return select_(mask | (a != a), a, b); }

INLINE vf binary(int64_t function, vf a, vf b) {
    switch (function) {
    case BINARY_ADD: return a + b;
    case BINARY_SUB: return a - b;
    case BINARY_MUL: return a * b;
    case BINARY_TANH_GRAD: return a * (1 - b * b);
    case BINARY_SIGMOID_GRAD: return a * (b * (1 - b));
    case BINARY_GELU_GRAD: return a * gelu_slope(b);
    case BINARY_GELU_TANH_GRAD: return a * gelu_tanh_slope(b);
    case BINARY_SILU_GRAD: return a * silu_slope(b);
    case BINARY_MAX: return chosen(a > b, a, b);
    case BINARY_MIN: return chosen(a < b, a, b);
    case BINARY_GREATER: return truth(a > b);
    case BINARY_AT_LEAST: return truth(a >= b);
    case BINARY_LESS: return truth(a < b);
    case BINARY_AT_MOST: return truth(a <= b);
    case BINARY_EQUAL: return truth(a == b);
    case BINARY_WHERE: return keep(b != 0, a);
    case BINARY_WHERE_NOT: return keep(~(b != 0), a);
    default: return a / b;
    }
}

/* One panel of a function of one operand; x and y begin with the panel. */
INLINE void unary_panel(const Op *op, const float *x, float *y, int64_t columns,
                        int64_t function) {
    const int64_t *sizes = op->i + 7, inner = AXES - 1;
    Walk walk = {sizes, sizes + AXES, sizes + 2 * AXES, {0}};
    int64_t from = op->i[4], to = op->i[6];
    do {
        const float *source = x + from * PANEL;
        float *target = y + to * PANEL;
        for (int64_t n = 0; n < sizes[inner]; n++) {
            for (int64_t c = 0; c < columns; c += VW)
                store(target + c, unary(function, load(source + c), op->f));
            source += walk.first[inner] * PANEL, target += walk.second[inner] * PANEL;
        }
    } while (next_rows(&walk, &from, &to));
}

/* GELU and its derivative, which share most of their work. */
static void gelu_and_slope(const Op *op, float *x, float *y, int64_t columns) {
    const int64_t *sizes = op->i + 7, inner = AXES - 1;
    Walk walk = {sizes, sizes + AXES, sizes + 2 * AXES, {0}};
    int64_t from = op->i[4], to = op->i[6];
    do {
        for (int64_t n = 0; n < sizes[inner]; n++) {
            float *source = x + (from + n * walk.first[inner]) * PANEL;
            float *target = y + (to + n * walk.second[inner]) * PANEL;
            for (int64_t c = 0; c < columns; c += VW) {
                vf value = load(source + c), normal = normal_(value);
                store(target + c, value * normal);
                store(source + c, gelu_slope_of(value, normal));
            }
        }
    } while (next_rows(&walk, &from, &to));
}

#define EACH_UNARY(X)                                                               \
    X(UNARY_COPY) X(UNARY_FILL) X(UNARY_NEG) X(UNARY_ABS) X(UNARY_RECIPROCAL)       \
    X(UNARY_SQRT) X(UNARY_RSQRT) X(UNARY_EXP) X(UNARY_LOG) X(UNARY_TANH)            \
    X(UNARY_SIGMOID) X(UNARY_ERF) X(UNARY_SIN) X(UNARY_COS) X(UNARY_GELU)           \
    X(UNARY_GELU_TANH) X(UNARY_SILU) X(UNARY_EXPM1) X(UNARY_LOG1P)            \
    X(UNARY_FROM_INT) X(UNARY_TO_INT)
#define UNARY_CASE(number) \
    case number: unary_panel(op, x, y, columns, number); break;

static void op_unary(const Op *op, const Call *call) {
    for (int64_t s = 0; s < num_samples(call); s += PANEL) {
        float *x = call->buffers[op->i[0]] + s * op->i[3];
        float *y = call->buffers[op->i[1]] + s * op->i[5];
        int64_t columns = columns_at(call, s);
        if (op->i[2] == UNARY_GELU_SLOPE) gelu_and_slope(op, x, y, columns);
        switch (op->i[2]) { EACH_UNARY(UNARY_CASE) }
    }
}

/* One panel of a function of two operands. `parameters` is NULL if b are rows. */
INLINE void binary_panel(const Op *op, const float *a, const float *b, float *y,
                         const float *parameters, int64_t columns, int64_t function) {
    const int64_t *sizes = op->i + 8, inner = AXES - 1;
    Walk walk = {sizes, sizes + AXES, sizes + 2 * AXES, {0}};
    int64_t first = op->i[5], second = parameters ? 0 : op->i[7];
    do {
        for (int64_t n = 0; n < sizes[inner]; n++, y += PANEL) {
            int64_t row = second + n * walk.second[inner];
            const float *x = a + (first + n * walk.first[inner]) * PANEL;
            for (int64_t c = 0; c < columns; c += VW) {
                vf other = parameters ? splat(parameters[row])
                                      : load(b + row * PANEL + c);
                store(y + c, binary(function, load(x + c), other));
            }
        }
    } while (next_rows(&walk, &first, &second));
}

#define EACH_BINARY(X)                                                              \
    X(BINARY_ADD) X(BINARY_SUB) X(BINARY_MUL) X(BINARY_DIV) X(BINARY_TANH_GRAD)     \
    X(BINARY_SIGMOID_GRAD) X(BINARY_GELU_GRAD) X(BINARY_GELU_TANH_GRAD)             \
    X(BINARY_SILU_GRAD) X(BINARY_MAX) X(BINARY_MIN) X(BINARY_GREATER)               \
    X(BINARY_AT_LEAST) X(BINARY_LESS) X(BINARY_AT_MOST) X(BINARY_EQUAL)             \
    X(BINARY_WHERE) X(BINARY_WHERE_NOT)
#define BINARY_CASE(number)                                                         \
    case number:                                                                    \
        if (parameters)                                                             \
            binary_panel(op, a, NULL, y, parameters, columns, number);              \
        else                                                                        \
            binary_panel(op, a, b, y, NULL, columns, number);                       \
        break;

static void op_binary(const Op *op, const Call *call) {
    int64_t rows = 1;
    for (int axis = 0; axis < AXES; axis++) rows *= op->i[8 + axis];
    const float *parameters = op->i[2] == -1   ? weights_at(call, op->i[7])
                              : op->i[2] == -2 ? op->f
                                               : NULL;
    for (int64_t s = 0; s < num_samples(call); s += PANEL) {
        const float *a = call->buffers[op->i[0]] + s * op->i[4];
        const float *b = parameters ? NULL : call->buffers[op->i[2]] + s * op->i[6];
        float *y = call->buffers[op->i[1]] + s * rows;
        int64_t columns = columns_at(call, s);
        switch (op->i[3]) { EACH_BINARY(BINARY_CASE) }
    }
}

/* A sum of terms one by one, in blocks of K_BLOCK. */
typedef struct {
    vf block, blocks;
    int64_t terms;
} ChainSum;

/* Another term comes; it may be the first of a block. */
INLINE void next_block(ChainSum *sum) {
    if (sum->terms == K_BLOCK)
        sum->blocks += sum->block, sum->block = (vf){0}, sum->terms = 0;
    sum->terms++;
}
INLINE void add_in_order(ChainSum *sum, vf x) {
    next_block(sum);
    sum->block += x;
}
INLINE vf sum_in_order(const ChainSum *sum) { return sum->blocks + sum->block; }

/* One row of sums; x is its first term. */
INLINE void sum_row(const Op *op, const float *x, float *y, int64_t columns) {
    const int64_t *sizes = op->i + 4, *strides = op->i + 8;
    for (int64_t c = 0; c < columns; c += VW) {
        ChainSum sum = {0};
        for (int64_t j = 0; j < sizes[2]; j++)
            for (int64_t k = 0; k < sizes[3]; k++)
                add_in_order(&sum, load(x + (j * strides[2] + k * strides[3]) * PANEL + c));
        store(y + c, sum_in_order(&sum) / op->f[0]);
    }
}

static void op_sum_rows(const Op *op, const Call *call) {
    const int64_t *sizes = op->i + 4, *strides = op->i + 8;
    for (int64_t s = 0; s < num_samples(call); s += PANEL) {
        const float *x = call->buffers[op->i[0]] + s * op->i[2] + op->i[3] * PANEL;
        float *y = call->buffers[op->i[1]] + s * sizes[0] * sizes[1];
        for (int64_t j = 0; j < sizes[0]; j++)
            for (int64_t k = 0; k < sizes[1]; k++, y += PANEL)
                sum_row(op, x + (j * strides[0] + k * strides[1]) * PANEL, y,
                        columns_at(call, s));
    }
}
