/* Tokens, and the rows of a table that stand for them. Tokens are kept by feature as
 * int32, a row for each position. */

/* What is no row of any table. */
#define NO_TOKEN (-1)

/* Those of the call, or constants, which every sample has. */
static void op_load_tokens(const Op *op, const Call *call) {
    int64_t positions = op->i[2], samples = num_samples(call);
    int64_t columns = op->i[4] ? op->i[4] : positions;
    const int64_t *tokens = (op->i[5] ? call->labels : call->tokens) + op->i[3];
    const float *same = op->i[1] < 0 ? NULL : weights_at(call, op->i[1]);
    for (int64_t first = 0; first < samples; first += PANEL)
        for (int64_t p = 0; p < positions; p++) {
            int32_t row[PANEL];
            for (int64_t s = 0; s < PANEL; s++) {
                int64_t token = NO_TOKEN;
                if (first + s < samples)
                    token = same ? (int64_t)same[p] : tokens[(first + s) * columns + p];
                row[s] = token == (int32_t)token ? (int32_t)token : NO_TOKEN;
            }
            memcpy(row_of(call->buffers[op->i[0]], first, positions, p), row,
                   sizeof row);
        }
}

/* Tokens that an operation reads: position p has row first + p * step. */
typedef struct {
    const Call *call;
    int64_t buffer, rows, first, step;
    int64_t positions, vocabulary;
} Tokens;

INLINE Tokens tokens_of(const Call *call, int64_t buffer, const int64_t *i) {
    return (Tokens){call, buffer, i[0], i[1], i[2], i[3], i[4]};
}
/* The token of a sample, or NO_TOKEN. */
INLINE int64_t token_at(const Tokens *t, int64_t position, int64_t sample) {
    int32_t token;
    int64_t row = t->first + position * t->step;
    float *panel = row_of(t->call->buffers[t->buffer], sample / PANEL * PANEL, t->rows,
                          row);
    memcpy(&token, panel + sample % PANEL, sizeof token);
    return token >= 0 && token < t->vocabulary ? token : NO_TOKEN;
}

/* Rows of VW tokens, transposed: VW features of VW samples, of which n exist. A token
 * that is no row of the table gives NaN. */
static void embed_block(const float *const *rows, int64_t n, int64_t width, int64_t f,
                        float *y) {
    vf block[VW];
    for (int64_t j = 0; j < VW; j++) {
        block[j] = j < n ? splat(__builtin_nanf("")) : (vf){0};
        if (rows[j]) block[j] = load_row(rows[j], f, width);
    }
    transpose_block(block);
    for (int64_t j = 0; j < VW && f + j < width; j++)
        store(y + (f + j) * PANEL, block[j]);
}

static void op_embedding(const Op *op, const Call *call) {
    int64_t width = op->i[2], samples = num_samples(call);
    Tokens tokens = tokens_of(call, op->i[0], op->i + 4);
    const float *table = weights_at(call, op->i[3]);
    for (int64_t s = 0; s < samples; s += VW)
        for (int64_t p = 0; p < tokens.positions; p++) {
            const float *rows[VW];
            for (int64_t j = 0; j < VW; j++) {
                int64_t token = token_at(&tokens, p, s + j);
                rows[j] = token < 0 ? NULL : table + token * width;
            }
            float *y = row_of(call->buffers[op->i[1]], s, tokens.positions * width,
                              p * width) + s % PANEL;
            for (int64_t f = 0; f < width; f += VW)
                embed_block(rows, samples - s, width, f, y);
        }
}

/* Where a call's tokens occur, sorted by token; those of one token by micro-batch,
 * position and sample. Integers, in the memory of two buffers. */
typedef struct {
    int32_t *ends;  /* [vocabulary + 1]: of token v, from ends[v] to ends[v + 1] */
    int32_t *order; /* rows of the gradient by sample: position * capacity + sample */
} Occurrences;

typedef int32_t Integers __attribute__((may_alias));

/* Call `take` for each occurrence, in order. */
#define EACH_OCCURRENCE(tokens, call, m, p, s)                                    \
    for (int64_t m = 0; m < (call)->micro_batches; m++)                           \
        for (int64_t p = 0; p < (tokens).positions; p++)                          \
            for (int64_t s = (call)->starts[m]; s < (call)->starts[m + 1]; s++)

static void sort_tokens(const Tokens *tokens, Integers *ends, Integers *order) {
    const Call *call = tokens->call;
    memset(ends, 0, (size_t)(tokens->vocabulary + 1) * sizeof *ends);
    EACH_OCCURRENCE(*tokens, call, m, p, s) {
        int64_t token = token_at(tokens, p, s);
        if (token >= 0) ends[token + 1]++;
    }
    for (int64_t v = 0; v < tokens->vocabulary; v++) ends[v + 1] += ends[v];
    /* ends[v] runs from the beginning of a token's occurrences to their end. */
    EACH_OCCURRENCE(*tokens, call, m, p, s) {
        int64_t token = token_at(tokens, p, s);
        if (token >= 0) order[ends[token]++] = (int32_t)(p * call->capacity + s);
    }
}

/* A panel of features of a gradient by sample; its rows are a token's terms. */
typedef struct {
    const Call *call;
    const float *panel;
    const Integers *next, *end; /* occurrences that are left */
} Terms;

/* Add the chain over the occurrences in micro-batch m to `sum`, which is +0. */
static void sum_occurrences(Terms *terms, int64_t m, vf sum[PANEL / VW]) {
    int64_t n = 0, capacity = terms->call->capacity;
    vf block[PANEL / VW] = {{0}};
    for (; terms->next < terms->end; terms->next++, n++) {
        if (*terms->next % capacity >= terms->call->starts[m + 1]) break;
        if (n % K_BLOCK == 0 && n > 0)
            for (int j = 0; j < PANEL / VW; j++) {
                sum[j] = n > K_BLOCK ? sum[j] + block[j] : block[j];
                block[j] = (vf){0};
            }
        const float *row = terms->panel + *terms->next * PANEL;
        for (int j = 0; j < PANEL / VW; j++) block[j] += load(row + j * VW);
    }
    for (int j = 0; j < PANEL / VW; j++)
        sum[j] = n > K_BLOCK ? sum[j] + block[j] : block[j];
}

/* One panel of one row of the table: all micro-batches, up the tree into the slots. */
static void sum_token(Terms terms, float *const *slots, int64_t place, int64_t n,
                      vf stack[][PANEL / VW]) {
    int64_t size = 0;
    for (int64_t m = 0; m < terms.call->micro_batches; m++) {
        sum_occurrences(&terms, m, stack[size++]);
        for (int64_t j = terms.call->merges[m]; j > 0; j--, size--)
            for (int v = 0; v < PANEL / VW; v++)
                stack[size - 2][v] += stack[size - 1][v];
    }
    for (int64_t j = 0; j < size; j++)
        for (int64_t f = 0; f < n; f += VW)
            store_part(slots[j] + place + f, stack[j][f / VW], smaller(VW, n - f));
}

/* Rows of tokens that do not occur are +0: no pass over them for each micro-batch. */
static void op_embedding_grad(const Op *op, const Call *call) {
    int64_t width = op->i[2], place = op->i[3];
    Tokens tokens = tokens_of(call, op->i[1], op->i + 4);
    Integers *ends = (Integers *)call->buffers[op->i[9]];
    Integers *order = (Integers *)call->buffers[op->i[10]];
    sort_tokens(&tokens, ends, order);
    vf stack[stack_size(call) + 1][PANEL / VW];
    int64_t panel = tokens.positions * call->capacity * PANEL;
    for (int64_t v = 0; v < tokens.vocabulary; v++) {
        const Integers *from = order + (v ? ends[v - 1] : 0), *to = order + ends[v];
        if (v == op->i[11]) to = from;
        for (int64_t j = 0; from == to && j < call->slots_size; j++)
            memset(call->slots[j] + place + v * width, 0, (size_t)width * 4);
        for (int64_t f = 0; from < to && f < width; f += PANEL) {
            const float *x = call->buffers[op->i[0]] + f / PANEL * panel;
            sum_token((Terms){call, x, from, to}, call->slots, place + v * width + f,
                      smaller(PANEL, width - f), stack);
        }
    }
}
