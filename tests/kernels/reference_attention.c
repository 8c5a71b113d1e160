/* Attention and embeddings of docs/arithmetic.md, one element after the other, as
 * plainly as it can be written. */
#include <math.h>
#include <string.h>

#include "samestep.h"

typedef const Op *In;
typedef const Call *At;

static float decay(float x) {
    if (x < -32) return 0;
    if (isnan(x)) return x;
    float n = fmaf(x, 0x1.715476p+0f, 0x1.8p23f) - 0x1.8p23f;
    float r = fmaf(n, 0x1.05c610p-29f, fmaf(n, -0x1.62e430p-1f, x));
    float q = fmaf(0x1.6a23d0p-10f, r, 0x1.123a20p-7f);
    q = fmaf(fmaf(fmaf(q, r, 0x1.5558f2p-5f), r, 0x1.555492p-3f), r, 0x1.fffffcp-2f);
    float power = ldexpf(1, (int)n);
    return fmaf(fmaf(r * r, q, r), power, power);
}

/* Sum over k of a[k] b[k], or of a[k], in blocks of 256. */
static float product(const float *a, const float *b, int64_t n) {
    float total = 0;
    for (int64_t k = 0; k < n; k += 256) {
        float s = 0;
        for (int64_t j = k; j < n && j < k + 256; j++)
            s = b ? fmaf(a[j], b[j], s) : s + a[j];
        total = k == 0 ? s : total + s;
    }
    return total;
}

static float *row(At call, int64_t buffer, int64_t rows, int64_t r, int64_t s) {
    return call->buffers[buffer] + (s / 32 * rows + r) * 32 + s % 32;
}
/* Element (head, position, feature) of a view, in its own or in another buffer. */
static float *in_view(At call, const int64_t *i, int64_t buffer, int64_t h, int64_t p,
                      int64_t d, int64_t s) {
    return row(call, buffer, i[1], i[2] + h * i[3] + p * i[4] + d, s);
}

typedef struct {
    int64_t heads, queries, keys, width;
} Sizes;

static float *output(In op, At call, Sizes z, int64_t h, int64_t p, int64_t d,
                     int64_t s) {
    int64_t i[5] = {0, z.queries * z.heads * z.width, 0, z.width, z.heads * z.width};
    return in_view(call, i, op->i[15], h, p, d, s);
}
static float *kept(In op, At call, Sizes z, int64_t which, int64_t h, int64_t p,
                   int64_t s) {
    int64_t half = z.heads * z.queries;
    return row(call, op->i[16], 2 * half, which * half + h * z.queries + p, s);
}

/* What is added to a score: of every sample, or one number for all of them. */
static float bias(In op, At call, int64_t h, int64_t q, int64_t j, int64_t s) {
    const int64_t *i = op->i + 30;
    int64_t at = i[2] + h * i[3] + q * i[4] + j * i[5];
    return i[0] < 0 ? call->parameters[at] : *row(call, i[0], i[1], at, s);
}

static void scores(In op, At call, Sizes z, int64_t h, int64_t q, int64_t s,
                   float *to) {
    for (int64_t j = 0; j < z.keys; j++) {
        float a[z.width], b[z.width];
        for (int64_t d = 0; d < z.width; d++) {
            a[d] = *in_view(call, op->i, op->i[0], h, q, d, s);
            b[d] = *in_view(call, op->i + 5, op->i[5], h, j, d, s);
        }
        to[j] = product(a, b, z.width);
        if (op->flags & OP_MASKED)
            to[j] = fmaf(to[j], op->f[0], bias(op, call, h, q, j, s));
    }
}
static float exponential(In op, float score, float top) {
    return decay(op->flags & OP_MASKED ? score - top : (score - top) * op->f[0]);
}

static void attention(In op, At call, Sizes z, int64_t h, int64_t q, int64_t s) {
    int64_t n = op->flags & OP_CAUSAL && q + 1 < z.keys ? q + 1 : z.keys;
    float e[z.keys], v[z.keys];
    scores(op, call, z, h, q, s, e);
    float top = e[0];
    for (int64_t j = 0; j < n; j++) top = e[j] > top ? e[j] : top;
    top = op->flags & OP_MASKED && top == -INFINITY ? 0 : top + 0.0f;
    for (int64_t j = 0; j < n; j++) e[j] = exponential(op, e[j], top);
    float total = product(e, NULL, n);
    if (total == 0) total = 1;
    *kept(op, call, z, 0, h, q, s) = top;
    *kept(op, call, z, 1, h, q, s) = total;
    for (int64_t d = 0; d < z.width; d++) {
        for (int64_t j = 0; j < n; j++)
            v[j] = *in_view(call, op->i + 10, op->i[10], h, j, d, s);
        *output(op, call, z, h, q, d, s) = product(e, v, n) / total;
    }
}

/* Exponentials e[q, j] and gradients g[q, j] of the scores; y / total in `dy`. */
static void gradients(In op, At call, Sizes z, int64_t h, int64_t q, int64_t s,
                      float *dy, float *e, float *g) {
    float y[z.width], v[z.width], top = *kept(op, call, z, 0, h, q, s);
    for (int64_t d = 0; d < z.width; d++) {
        y[d] = *output(op, call, z, h, q, d, s);
        dy[d] = *in_view(call, op->i + 17, op->i[17], h, q, d, s) /
                *kept(op, call, z, 1, h, q, s);
    }
    float delta = product(dy, y, z.width);
    scores(op, call, z, h, q, s, e);
    for (int64_t j = 0; j < z.keys; j++) {
        for (int64_t d = 0; d < z.width; d++)
            v[d] = *in_view(call, op->i + 10, op->i[10], h, j, d, s);
        e[j] = exponential(op, e[j], top);
        g[j] = e[j] * (product(dy, v, z.width) - delta);
    }
}

/* Sum over the queries that see key j, in blocks of 256 of all queries. */
static float over_queries(In op, Sizes z, int64_t j, const float *a, const float *b) {
    float total = 0;
    for (int64_t first = 0; first < z.queries; first += 256) {
        float sum = 0;
        for (int64_t q = first; q < z.queries && q < first + 256; q++)
            if (!(op->flags & OP_CAUSAL) || j <= q)
                sum = fmaf(a[q * z.keys + j], b[q * z.width], sum);
        total = first == 0 ? sum : total + sum;
    }
    return total;
}

static void attention_grad(In op, At call, Sizes z, int64_t h, int64_t s) {
    float dy[z.queries][z.width], e[z.queries][z.keys], g[z.queries][z.keys];
    float x[z.queries][z.width], k[z.keys], scale = op->f[0];
    for (int64_t q = 0; q < z.queries; q++) {
        gradients(op, call, z, h, q, s, dy[q], e[q], g[q]);
        int64_t n = op->flags & OP_CAUSAL && q + 1 < z.keys ? q + 1 : z.keys;
        for (int64_t d = 0; d < z.width; d++) {
            x[q][d] = *in_view(call, op->i, op->i[0], h, q, d, s);
            for (int64_t j = 0; j < n; j++)
                k[j] = *in_view(call, op->i + 5, op->i[5], h, j, d, s);
            *in_view(call, op->i, op->i[22], h, q, d, s) = product(g[q], k, n) * scale;
        }
    }
    for (int64_t j = 0; j < z.keys; j++)
        for (int64_t d = 0; d < z.width; d++) {
            *in_view(call, op->i + 5, op->i[23], h, j, d, s) =
                over_queries(op, z, j, g[0], x[0] + d) * scale;
            *in_view(call, op->i + 10, op->i[24], h, j, d, s) =
                over_queries(op, z, j, e[0], dy[0] + d);
        }
}

/* Tokens, and tables of their rows. */
static int64_t token_of(In op, At call, int64_t buffer, int64_t p, int64_t s) {
    int32_t token;
    memcpy(&token, row(call, buffer, op->i[4], op->i[5] + p * op->i[6], s), 4);
    return token;
}
static void load_tokens(In op, At call, int64_t s) {
    for (int64_t p = 0; p < op->i[2]; p++) {
        int64_t token = op->i[1] < 0 ? call->tokens[s * op->i[2] + p]
                                     : (int64_t)call->parameters[op->i[1] + p];
        int32_t kept = token < 0 || token > INT32_MAX ? -1 : token;
        memcpy(row(call, op->i[0], op->i[2], p, s), &kept, 4);
    }
}
static void embedding(In op, At call, int64_t s) {
    int64_t width = op->i[2], positions = op->i[7];
    for (int64_t p = 0; p < positions; p++) {
        int64_t token = token_of(op, call, op->i[0], p, s);
        int is_row = token >= 0 && token < op->i[8];
        for (int64_t d = 0; d < width; d++)
            *row(call, op->i[1], positions * width, p * width + d, s) =
                is_row ? call->parameters[op->i[3] + token * width + d] : NAN;
    }
}
static void embedding_grad(In op, At call, int64_t v, int64_t d) {
    int64_t width = op->i[2], positions = op->i[7], size = 0;
    float stack[call->micro_batches];
    for (int64_t m = 0; m < call->micro_batches; m++) {
        int64_t first = call->starts[m], end = call->starts[m + 1], n = 0;
        float terms[positions * (end - first) + 1];
        for (int64_t p = 0; p < positions; p++)
            for (int64_t s = first; s < end; s++)
                if (token_of(op, call, op->i[1], p, s) == v && v != op->i[11])
                    terms[n++] = call->buffers[op->i[0]][
                        (d / 32 * positions * call->capacity + p * call->capacity + s) *
                            32 + d % 32];
        stack[size++] = product(terms, NULL, n);
        for (int64_t j = 0; j < call->merges[m]; j++, size--)
            stack[size - 2] += stack[size - 1];
    }
    for (int64_t j = 0; j < size; j++)
        call->slots[j][op->i[3] + v * width + d] = stack[j];
}

static void run_tokens(In op, At call) {
    int64_t samples = call->starts[call->micro_batches];
    for (int64_t s = 0; s < samples && op->kind == OP_LOAD_TOKENS; s++)
        load_tokens(op, call, s);
    for (int64_t s = 0; s < samples && op->kind == OP_EMBEDDING; s++)
        embedding(op, call, s);
    for (int64_t v = 0; v < op->i[8] && op->kind == OP_EMBEDDING_GRAD; v++)
        for (int64_t d = 0; d < op->i[2]; d++) embedding_grad(op, call, v, d);
}

void reference_run(In op, At call) {
    if (op->kind != OP_ATTENTION && op->kind != OP_ATTENTION_GRAD) {
        run_tokens(op, call);
        return;
    }
    Sizes z = {op->i[26], op->i[27], op->i[28], op->i[29]};
    for (int64_t s = 0; s < call->starts[call->micro_batches]; s++)
        for (int64_t h = 0; h < z.heads; h++) {
            if (op->kind == OP_ATTENTION_GRAD)
                attention_grad(op, call, z, h, s);
            else
                for (int64_t q = 0; q < z.queries; q++)
                    attention(op, call, z, h, q, s);
        }
}
