/* Attention, head by head, VW samples at once: every lane is a sample. Queries are taken
 * in blocks, so that only their scores are ever in memory; the backward pass computes
 * them again, from the largest score and the sum that the forward pass has kept. */

#define ATTENTION_WIDTH 512 /* floats of a block of queries beside each other */
#define KEYS_TOGETHER 16    /* whose part of the outputs is added at a time */

/* e^x, 0 below e^-32. The scores of a row are exponents of at most 0, and this needs a
 * quarter of the time of exp_. Within 0.6 units in the last place. */
INLINE vf decay(vf x) {
    const float magic = 0x1.8p23f;
    vf shifted = fma_(x, splat(0x1.715476p+0f), splat(magic)), n = shifted - magic;
    vf r = fma_(n, splat(-0x1.62e430p-1f), x);
    r = fma_(n, splat(0x1.05c610p-29f), r);
    vf q = splat(0x1.6a23d0p-10f);
    q = fma_(q, r, splat(0x1.123a20p-7f));
    q = fma_(q, r, splat(0x1.5558f2p-5f));
    q = fma_(q, r, splat(0x1.555492p-3f));
    q = fma_(q, r, splat(0x1.fffffcp-2f));
    vf rest = fma_(r * r, q, r);
    vf power = (vf)(((vu)shifted + 127) << 23);
    return keep(~(x < -32), fma_(rest, power, power));
}

/* Where the vectors of one head lie: rows of the panels of a buffer. */
typedef struct {
    int64_t buffer, rows, offset, head, position;
} View;

INLINE View view_at(const int64_t *i) { return (View){i[0], i[1], i[2], i[3], i[4]}; }

/* One head of VW samples. */
typedef struct {
    const Op *op;
    const Call *call;
    int64_t head, column; /* of the samples */
    int64_t heads, queries, keys, width;
    int64_t together;     /* queries of a block */
    int is_causal, is_masked;
    float scale; /* of what a score is below the largest one */
    float *room; /* what is left of the workspace */
} Head;

/* A matrix [positions, width] of a view, for reading or for writing. */
static Matrix rows_of_view(const Head *h, View view) {
    float *panel = h->call->buffers[view.buffer] +
                   h->column / PANEL * view.rows * PANEL + h->column % PANEL;
    return (Matrix){panel + (view.offset + h->head * view.head) * PANEL,
                    view.position * PANEL, PANEL};
}
/* Scores of queries in the workspace: a line more than the keys need, as rows that are a
 * multiple of 4,096 bytes apart would push each other out of the nearest cache. */
static Matrix take_scores(Head *h, int64_t rows) {
    Matrix m = {h->room, (h->keys | 1) * VW, VW};
    h->room += rows * m.row;
    return m;
}
/* A dense matrix in the workspace. */
static Matrix take(Head *h, int64_t rows, int64_t columns) {
    Matrix m = {h->room, columns * VW, VW};
    h->room += rows * columns * VW;
    return m;
}
static void copy_vectors(Matrix to, Matrix from, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
            __builtin_prefetch(matrix_at(from, i + 1, j).at); /* often another page */
            store(matrix_at(to, i, j).at, load(matrix_at(from, i, j).at));
        }
}
static void clear_vectors(Matrix m, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows * columns; i++) store(m.at + i * VW, (vf){0});
}
/* to = from in the first block of a sum, to + from in others; dense matrices. */
static void add_vectors(Matrix to, Matrix from, int64_t size, int is_first) {
    for (int64_t i = 0; i < size * VW; i += VW) {
        vf x = load(from.at + i);
        store(to.at + i, is_first ? x : load(to.at + i) + x);
    }
}

/* How many keys a query sees. */
INLINE int64_t seen_by(const Head *h, int64_t query) {
    return h->is_causal ? smaller(query + 1, h->keys) : h->keys;
}

/* The vectors of a head, copied to lie side by side: positions of a view may be a
 * multiple of a cache's size apart. */
static Matrix packed(Head *h, View view, int64_t positions) {
    Matrix m = take(h, positions, h->width);
    copy_vectors(m, rows_of_view(h, view), positions, h->width);
    return m;
}

/* c[i, :] += weights[i, :] x for `rows` queries from `query` on, key by key. Chains of
 * K_BLOCK keys are added to `sums`, dense as `c`. */
static void mix_keys(const Head *h, Matrix sums, Matrix c, Matrix weights, Matrix x,
                     int64_t query, int64_t rows) {
    int64_t most = seen_by(h, query + rows - 1);
    for (int64_t first = 0; first < most; first += KEYS_TOGETHER) {
        int64_t last = smaller(first + KEYS_TOGETHER, most);
        Chaining chaining = first % K_BLOCK ? CONTINUE : BEGIN;
        for (int64_t i = 0; i < rows; i += BLOCK_ROWS) {
            int64_t height = smaller(BLOCK_ROWS, rows - i);
            /* Keys that all queries of the tile see; then those that some see. */
            int64_t all = smaller(last, seen_by(h, query + i)), end = last;
            if (all > first || chaining == BEGIN)
                multiply_vectors(matrix_at(c, i, 0), matrix_at(weights, i, first),
                                 matrix_at(x, first, 0), height, h->width,
                                 all > first ? all - first : 0, chaining);
            if (all < first) all = first;
            for (int64_t r = 1; r < height && all < end; r++) {
                int64_t more = smaller(end, seen_by(h, query + i + r)) - all;
                if (more > 0)
                    multiply_vectors(matrix_at(c, i + r, 0),
                                     matrix_at(weights, i + r, all),
                                     matrix_at(x, all, 0), 1, h->width, more, CONTINUE);
            }
        }
        if (last % K_BLOCK == 0 || last == most)
            add_vectors(sums, c, rows * h->width, (last - 1) / K_BLOCK == 0);
    }
}

/* c[j, :] += weights[:, j] x for all keys that the queries see, query by query. */
static void mix_queries(const Head *h, Matrix c, Matrix weights, Matrix x,
                        int64_t query, int64_t rows) {
    int64_t most = seen_by(h, query + rows - 1);
    Matrix turned = transposed(weights);
    for (int64_t j = 0; j < most; j += BLOCK_ROWS) {
        int64_t height = smaller(BLOCK_ROWS, most - j), first = 0;
        /* Queries that see only some keys of the tile; then those that see all. */
        for (; first < rows && seen_by(h, query + first) < j + height; first++) {
            int64_t some = seen_by(h, query + first) - j;
            if (some > 0)
                multiply_vectors(matrix_at(c, j, 0), matrix_at(turned, j, first),
                                 matrix_at(x, first, 0), some, h->width, 1, CONTINUE);
        }
        multiply_vectors(matrix_at(c, j, 0), matrix_at(turned, j, first),
                         matrix_at(x, first, 0), height, h->width, rows - first,
                         CONTINUE);
    }
}

/* What is added to the scores of one query: a number for each key, or a vector. */
typedef struct {
    const float *at;
    int64_t key; /* floats from one key to the next */
    int is_number;
} Biases;

static Biases biases_of(const Head *h, int64_t query) {
    const int64_t *i = h->op->i + 30;
    int64_t first = i[2] + h->head * i[3] + query * i[4];
    if (i[0] < 0) return (Biases){weights_at(h->call, i[2]) + (first - i[2]), i[5], 1};
    const float *panel = h->call->buffers[i[0]] + h->column / PANEL * i[1] * PANEL;
    return (Biases){panel + h->column % PANEL + first * PANEL, i[5] * PANEL, 0};
}
/* The scores of the queries from `query` on, scaled, with what is added to them. */
static void mask_scores(const Head *h, Matrix scores, int64_t query, int64_t rows) {
    vf scale = splat(h->op->f[0]);
    for (int64_t i = 0; i < rows && h->is_masked; i++) {
        Biases biases = biases_of(h, query + i);
        float *s = matrix_at(scores, i, 0).at;
        for (int64_t j = 0; j < seen_by(h, query + i); j++) {
            const float *at = biases.at + j * biases.key;
            vf bias = biases.is_number ? splat(*at) : load(at);
            store(s + j * VW, fma_(load(s + j * VW), scale, bias));
        }
    }
}

/* The largest score of a row of n, never -0; +0 where a mask has left none. */
INLINE vf largest_score(const Head *h, const float *s, int64_t n) {
    vf top = load(s);
    for (int64_t j = 1; j < n; j++) {
        vf x = load(s + j * VW);
        top = select_(x > top, x, top);
    }
    vi is_empty = h->is_masked ? top == splat(-__builtin_inff()) : splat_int(0);
    return keep(~is_empty, top + 0.0f);
}
/* e^(scale (s - top)) in the place of a row of scores. */
INLINE void exponentials(float *s, int64_t n, vf top, float scale) {
    for (int64_t j = 0; j < n; j++)
        store(s + j * VW, decay((load(s + j * VW) - top) * scale));
}
INLINE vf chain_of(const float *x, int64_t n) {
    vf total = {0};
    for (int64_t first = 0; first < n; first += K_BLOCK) {
        vf sum = {0};
        for (int64_t j = first; j < n && j < first + K_BLOCK; j++)
            sum += load(x + j * VW);
        total = first ? total + sum : sum;
    }
    return total;
}

/* What is kept of a query: its largest score, and the sum of exponentials, or 1 where a
 * mask has left none. */
INLINE Matrix kept(const Head *h) {
    View view = {h->op->i[16], 2 * h->heads * h->queries, 0, h->queries, 1};
    Matrix m = rows_of_view(h, view);
    m.column = h->heads * h->queries * PANEL;
    return m;
}

static Matrix outputs_of(const Head *h, int64_t query) {
    View view = {h->op->i[15], h->queries * h->heads * h->width, 0, h->width,
                 h->heads * h->width};
    return matrix_at(rows_of_view(h, view), query, 0);
}

/* The queries [query, query + rows). */
static void attend_queries(Head h, Matrix keys, Matrix values, int64_t query,
                           int64_t rows) {
    Matrix x = take(&h, rows, h.width), c = take(&h, rows, h.width);
    Matrix sums = take(&h, rows, h.width), scores = take_scores(&h, rows);
    copy_vectors(x, matrix_at(rows_of_view(&h, view_at(h.op->i)), query, 0), rows,
                 h.width);
    multiply_all(scores, x, transposed(keys), rows, seen_by(&h, query + rows - 1),
                 h.width);
    mask_scores(&h, scores, query, rows);
    for (int64_t i = 0; i < rows; i++) {
        float *row = matrix_at(scores, i, 0).at;
        int64_t n = seen_by(&h, query + i);
        vf top = largest_score(&h, row, n);
        exponentials(row, n, top, h.scale);
        vf total = chain_of(row, n);
        store(matrix_at(kept(&h), query + i, 0).at, top);
        store(matrix_at(kept(&h), query + i, 1).at,
              select_(total == 0, splat(1), total));
    }
    mix_keys(&h, sums, c, scores, values, query, rows);
    for (int64_t i = 0; i < rows; i++) {
        vf total = load(matrix_at(kept(&h), query + i, 1).at);
        for (int64_t d = 0; d < h.width; d++)
            store(matrix_at(outputs_of(&h, query + i), 0, d).at,
                  load(matrix_at(sums, i, d).at) / total);
    }
}

static void attend(Head h) {
    Matrix keys = packed(&h, view_at(h.op->i + 5), h.keys);
    Matrix values = packed(&h, view_at(h.op->i + 10), h.keys);
    for (int64_t q = 0; q < h.queries; q += h.together)
        attend_queries(h, keys, values, q, smaller(h.together, h.queries - q));
}

/* The sums over queries of one head: of this block of K_BLOCK queries, and of those
 * before it. */
typedef struct {
    Matrix block, before;
} SumsOfQueries;

static SumsOfQueries take_sums(Head *h) {
    SumsOfQueries sums = {.block = take(h, h->keys, h->width)};
    sums.before = h->queries > K_BLOCK ? take(h, h->keys, h->width) : sums.block;
    clear_vectors(sums.block, h->keys, h->width);
    return sums;
}
static void end_sums(const Head *h, SumsOfQueries sums, int64_t end) {
    if (h->queries <= K_BLOCK || (end % K_BLOCK && end < h->queries)) return;
    add_vectors(sums.before, sums.block, h->keys * h->width, end <= K_BLOCK);
    clear_vectors(sums.block, h->keys, h->width);
}
/* Write a gradient, multiplied, where its view is in another buffer. */
static void put_gradient(const Head *h, const int64_t *view, int64_t buffer,
                         Matrix from, int64_t position, int64_t rows, float factor) {
    View place = view_at(view);
    place.buffer = buffer;
    Matrix to = matrix_at(rows_of_view(h, place), position, 0);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < h->width; d++)
            store(matrix_at(to, i, d).at, load(matrix_at(from, i, d).at) * factor);
}

/* dy / total of the queries' outputs, and its products with these. */
static void scale_gradients(Head *h, Matrix dy, Matrix deltas, int64_t query,
                            int64_t rows) {
    Matrix from = matrix_at(rows_of_view(h, view_at(h->op->i + 17)), query, 0);
    for (int64_t i = 0; i < rows; i++) {
        vf total = load(matrix_at(kept(h), query + i, 1).at);
        for (int64_t d = 0; d < h->width; d++)
            store(matrix_at(dy, i, d).at, load(matrix_at(from, i, d).at) / total);
        multiply_all(matrix_at(deltas, i, 0), matrix_at(dy, i, 0),
                     transposed(outputs_of(h, query + i)), 1, 1, h->width);
    }
}

/* Exponentials of the queries' scores, and the scores' gradients. */
static void score_gradients(Head *h, Matrix scores, Matrix gradients, Matrix deltas,
                            int64_t query, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
        float *e = matrix_at(scores, i, 0).at, *g = matrix_at(gradients, i, 0).at;
        int64_t n = seen_by(h, query + i);
        vf delta = load(matrix_at(deltas, i, 0).at);
        exponentials(e, n, load(matrix_at(kept(h), query + i, 0).at), h->scale);
        for (int64_t j = 0; j < n * VW; j += VW)
            store(g + j, load(e + j) * (load(g + j) - delta));
    }
}

typedef struct {
    Matrix keys, values;
    SumsOfQueries to_keys, to_values;
} KeysAndValues;

static void attend_queries_back(Head h, const KeysAndValues *kv, int64_t query,
                                int64_t rows) {
    int64_t seen = seen_by(&h, query + rows - 1);
    Matrix x = take(&h, rows, h.width), dy = take(&h, rows, h.width);
    Matrix c = take(&h, rows, h.width), sums = take(&h, rows, h.width);
    Matrix deltas = take(&h, rows, 1);
    Matrix scores = take_scores(&h, rows), gradients = take_scores(&h, rows);
    copy_vectors(x, matrix_at(rows_of_view(&h, view_at(h.op->i)), query, 0), rows,
                 h.width);
    scale_gradients(&h, dy, deltas, query, rows);
    multiply_all(scores, x, transposed(kv->keys), rows, seen, h.width);
    mask_scores(&h, scores, query, rows);
    multiply_all(gradients, dy, transposed(kv->values), rows, seen, h.width);
    score_gradients(&h, scores, gradients, deltas, query, rows);
    mix_keys(&h, sums, c, gradients, kv->keys, query, rows);
    put_gradient(&h, h.op->i, h.op->i[22], sums, query, rows, h.op->f[0]);
    mix_queries(&h, kv->to_keys.block, gradients, x, query, rows);
    mix_queries(&h, kv->to_values.block, scores, dy, query, rows);
    end_sums(&h, kv->to_keys, query + rows);
    end_sums(&h, kv->to_values, query + rows);
}

static void attend_back(Head h) {
    KeysAndValues kv = {.keys = packed(&h, view_at(h.op->i + 5), h.keys),
                        .values = packed(&h, view_at(h.op->i + 10), h.keys)};
    kv.to_keys = take_sums(&h);
    kv.to_values = take_sums(&h);
    for (int64_t q = 0; q < h.queries; q += h.together)
        attend_queries_back(h, &kv, q, smaller(h.together, h.queries - q));
    put_gradient(&h, h.op->i + 5, h.op->i[23], kv.to_keys.before, 0, h.keys,
                 h.op->f[0]);
    put_gradient(&h, h.op->i + 10, h.op->i[24], kv.to_values.before, 0, h.keys, 1);
}

/* Queries whose vectors fill the nearest cache; they divide a block of a sum. */
static int64_t queries_together(int64_t width) {
    int64_t n = 16;
    while (n > 4 && n * width > ATTENTION_WIDTH) n /= 2;
    return n;
}

static void each_head(const Op *op, const Call *call, void (*run_head)(Head)) {
    const int64_t *sizes = op->i + 26;
    Head h = {.op = op, .call = call, .heads = sizes[0], .queries = sizes[1],
              .keys = sizes[2], .width = sizes[3], .is_causal = op->flags & OP_CAUSAL,
              .is_masked = op->flags & OP_MASKED};
    h.scale = h.is_masked ? 1 : op->f[0];
    h.together = queries_together(h.width);
    /* A head's lines serve several vectors of samples while they are in a cache. */
    for (int64_t s = 0; s < num_samples(call); s += PANEL)
        for (h.head = 0; h.head < h.heads; h.head++)
            for (int64_t c = 0; c < columns_at(call, s); c += VW) {
                h.column = s + c;
                h.room = call->buffers[op->i[25]];
                run_head(h);
            }
}

static void op_attention(const Op *op, const Call *call) {
    each_head(op, call, attend);
}
static void op_attention_grad(const Op *op, const Call *call) {
    each_head(op, call, attend_back);
}
