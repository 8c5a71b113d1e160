/* The sum of the gradients up the tree, and what follows it, in one pass over memory:
 * chunks of the sums stay in the nearest cache. */

#define CHUNK 512  /* elements */
#define DEEPEST 34 /* sums that wait, at most: the tree of 2^31 leaves is no deeper */

INLINE void add_into(float *out, const float *a, const float *b, int64_t n) {
    int64_t i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        store(out + i, load(a + i) + load(b + i));
        store(out + i + VW, load(a + i + VW) + load(b + i + VW));
    }
    for (; i < n; i++) out[i] = a[i] + b[i];
}

/* The two sums below the root of the tree; of a tree of one leaf, b is NULL. */
typedef struct {
    const float *a, *b;
} Halves;

INLINE vf root_of(Halves sum, int64_t i) {
    return sum.b ? load(sum.a + i) + load(sum.b + i) : load(sum.a + i);
}
INLINE vf root_part(Halves sum, int64_t i, int64_t n) {
    vf a = load_part(sum.a + i, n);
    return sum.b ? a + load_part(sum.b + i, n) : a;
}

/* Elements [first, first + n), n <= CHUNK, of all sums but the last: in the leaves, or
 * in `room`. */
static Halves sum_chunk(const float *const *leaves, const int32_t *order,
                        int64_t order_size, int64_t first, int64_t n,
                        float room[DEEPEST][CHUNK]) {
    const float *stack[DEEPEST] = {NULL};
    int64_t size = 0;
    for (int64_t i = 0; i < order_size; i++)
        if (order[i] >= 0) {
            stack[size++] = leaves[order[i]] + first;
        } else if (i + 1 < order_size) {
            size--;
            add_into(room[size - 1], stack[size - 1], stack[size], n);
            stack[size - 1] = room[size - 1];
        }
    return (Halves){stack[0], size > 1 ? stack[1] : NULL};
}

static void tree_sum(float *out, const float *const *leaves, const int32_t *order,
                     int64_t order_size, int64_t size) {
    float room[DEEPEST][CHUNK];
    for (int64_t i = 0; i < size; i += CHUNK) {
        int64_t n = smaller(CHUNK, size - i);
        Halves sum = sum_chunk(leaves, order, order_size, i, n, room);
        if (sum.b)
            add_into(out + i, sum.a, sum.b, n);
        else
            memmove(out + i, sum.a, (size_t)n * sizeof(float));
    }
}

#include "hashes.h"

/* |x| < bound ? +0 : x */
INLINE vf zero_below(vf x, float bound) { return keep(~(abs_(x) < bound), x); }

/* What the update needs, as vectors. */
typedef struct {
    vf lr, decay, beta1, one_minus_beta1, one_minus_beta2, root, eps;
} Numbers;

INLINE Numbers numbers_of(const Optimizer *how) {
    return (Numbers){.lr = splat(-how->lr),
                     .decay = splat(how->weight_decay),
                     .beta1 = splat(how->beta1),
                     .one_minus_beta1 = splat(how->one_minus_beta1),
                     .one_minus_beta2 = splat(how->one_minus_beta2),
                     .root = splat(how->root),
                     .eps = splat(how->eps)};
}

INLINE vf adam(const Numbers *with, int kind, int has_decay, vf g, vf p, vf *m, vf *v) {
    if (kind == ADAM && has_decay) g = fma_(with->decay, p, g);
    g = zero_below(g, 0x1p-62f);
    *m = zero_below(fma_(with->one_minus_beta1, g - *m, *m), 0x1p-100f);
    *v = zero_below(fma_(with->one_minus_beta2, g * g - *v, *v), 0x1p-100f);
    if (kind == ADAMW) p *= with->decay;
    return fma_(with->lr, *m / fma_(sqrt_(*v), with->root, with->eps), p);
}
INLINE vf sgd(const Numbers *with, const Optimizer *how, int has_decay, vf g, vf p,
              vf *m) {
    if (has_decay) g = fma_(with->decay, p, g);
    if (how->beta1 != 0) {
        *m = how->is_first ? g : fma_(with->beta1, *m, g);
        g = how->nesterov ? fma_(with->beta1, *m, g) : *m;
    }
    return fma_(with->lr, g, p);
}

/* Elements [i, i + VW), or n < VW of them. */
INLINE void update_vector(const Numbers *with, const Optimizer *how, int kind,
                          int has_decay, Halves sum, float *p, float *m, float *v,
                          int64_t i, int64_t n) {
    int is_whole = n >= VW, has_first = kind != SGD || how->beta1 != 0;
    vf first = {0}, second = {0};
    vf g = is_whole ? root_of(sum, i) : root_part(sum, i, n);
    vf old = is_whole ? load(p + i) : load_part(p + i, n);
    if (has_first) first = is_whole ? load(m + i) : load_part(m + i, n);
    if (kind != SGD) second = is_whole ? load(v + i) : load_part(v + i, n);
    vf new = kind == SGD ? sgd(with, how, has_decay, g, old, &first)
                         : adam(with, kind, has_decay, g, old, &first, &second);
    is_whole ? store(p + i, new) : store_part(p + i, new, n);
    if (has_first) is_whole ? store(m + i, first) : store_part(m + i, first, n);
    if (kind != SGD) is_whole ? store(v + i, second) : store_part(v + i, second, n);
}

INLINE void update_all(const Optimizer *how, int kind, int has_decay, Halves sum,
                       float *p, float *m, float *v, int64_t n) {
    Numbers with = numbers_of(how);
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        update_vector(&with, how, kind, has_decay, sum, p, m, v, i, VW);
    if (i < n) update_vector(&with, how, kind, has_decay, sum, p, m, v, i, n - i);
}
/* Each case is code of its own, without tests in the loop. */
INLINE void update_chunk(const Optimizer *how, Halves sum, float *p, float *m, float *v,
                         int64_t n) {
    int has_decay = how->weight_decay != 0;
    Halves one = {sum.a, NULL};
    if (how->kind == SGD)
        update_all(how, SGD, has_decay, sum, p, m, v, n);
    else if (how->kind == ADAM && has_decay && sum.b)
        update_all(how, ADAM, 1, sum, p, m, v, n);
    else if (how->kind == ADAM && has_decay)
        update_all(how, ADAM, 1, one, p, m, v, n);
    else if (how->kind == ADAM)
        update_all(how, ADAM, 0, sum, p, m, v, n);
    else
        update_all(how, ADAMW, 0, sum, p, m, v, n);
}

/* And the hashes of both, of elements from `first` on, while they are in the nearest
 * cache. */
INLINE void update_and_hash(const Optimizer *how, Halves sum, float *p, float *m,
                            float *v, int64_t first, int64_t n, Hashes *hashes) {
    if (hashes) hashes->gradient += hash_gradient(hashes->keys, sum, first, n);
    update_chunk(how, sum, p, m, v, n);
    if (hashes) hashes->parameters += hash_vector(hashes->keys, p, first, n);
}

static void update(const Optimizer *how, const float *const *leaves,
                   const int32_t *order, int64_t order_size, float *parameters,
                   float *state1, float *state2, int64_t first, int64_t size,
                   Hashes *hashes) {
    float room[DEEPEST][CHUNK];
    /* Without sums or hashes in between: all. */
    int64_t chunk = order_size > 3 || hashes ? CHUNK : size;
    for (int64_t i = 0; i < size; i += chunk) {
        int64_t n = smaller(chunk, size - i);
        Halves sum = sum_chunk(leaves, order, order_size, i, n, room);
        update_and_hash(how, sum, parameters + i, state1 ? state1 + i : NULL,
                        state2 ? state2 + i : NULL, first + i, n, hashes);
    }
}

static void average(float *mean, const float *parameters, float weight, int64_t size) {
    int64_t i = 0;
    for (; i + VW <= size; i += VW) {
        vf old = load(mean + i);
        store(mean + i, fma_(splat(weight), load(parameters + i) - old, old));
    }
    if (i == size) return;
    vf old = load_part(mean + i, size - i), p = load_part(parameters + i, size - i);
    store_part(mean + i, fma_(splat(weight), p - old, old), size - i);
}

static void scale(float *vector, float factor, int64_t size) {
    int64_t i = 0;
    for (; i + VW <= size; i += VW) store(vector + i, load(vector + i) * factor);
    for (; i < size; i++) vector[i] *= factor;
}

/* The square of a float is exact in double. */
static double squared_norm(const float *x) {
    vd lanes[LANES / DW] = {{0}};
    for (int i = 0; i < NORM_BLOCK; i += LANES)
        for (int j = 0; j < LANES / VW; j++) {
            vf part = load(x + i + j * VW);
            vd low = low_double(part), high = high_double(part);
            lanes[2 * j] += low * low;
            lanes[2 * j + 1] += high * high;
        }
    double all[LANES];
    for (int j = 0; j < LANES / DW; j++) store_double(all + j * DW, lanes[j]);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) all[l] += all[l + half];
    return all[0];
}
static void squared_norms(const float *vector, double *squares, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++)
        squares[b] = squared_norm(vector + b * NORM_BLOCK);
}
