/* Dropout from counters, for elements by feature. One number is drawn for element
 * e = sample * width + feature of a micro-batch [samples, width]; the part of the
 * counter that depends on the sample is computed once for a panel, so any columns may
 * belong to any micro-batches. About 20 cycles for 16 elements with AVX-512. */
#ifndef DRAWS_H
#define DRAWS_H

#include "samestep.h"
#include "vector.h"

#define GOLDEN 0x9E3779B9u

typedef struct {
    uint32_t counter[PANEL]; /* of feature 0: the first mix begins with it */
    uint32_t key[PANEL];     /* for the second mix */
    uint32_t limit;          /* numbers below it drop their element */
    float factor;            /* of the others */
} Draws;

/* The micro-batch of a column; the last one for padding. */
static int64_t micro_batch_of(const Call *call, int64_t column) {
    int64_t low = 0, high = call->micro_batches;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (call->starts[middle] <= column)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* For the panel that begins at column `first`, and dropout with a float p < 1. */
static void prepare_draws(Draws *draws, const Call *call, int64_t first, int64_t width,
                          int64_t stream, float p) {
    int64_t m = micro_batch_of(call, first);
    for (int64_t c = 0; c < PANEL; c++) {
        while (m + 1 < call->micro_batches && call->starts[m + 1] <= first + c) m++;
        uint64_t element = (uint64_t)(first + c - call->starts[m]) * (uint64_t)width;
        draws->counter[c] = (uint32_t)element * GOLDEN + (uint32_t)call->keys[m];
        draws->key[c] =
            (uint32_t)(call->keys[m] >> 32) + (uint32_t)stream * 0x85EBCA6Bu;
    }
    double limit = (double)p * 0x1p32 + 0.5; /* a float times 2^32 + 1/2 is exact */
    draws->limit = limit < 0x1p32 ? (uint32_t)limit : UINT32_MAX;
    draws->factor = (float)(1 / (1 - (double)p));
}

INLINE vu mix(vu x) {
    x = (x ^ x >> 16) * 0x21F0AAADu;
    x = (x ^ x >> 15) * 0x735A2D97u;
    return x ^ x >> 15;
}
/* VW columns of a panel, from `column` (0..31) on, of one feature. */
INLINE vu drawn(const Draws *draws, int64_t column, int64_t feature) {
    vu counter = (vu)load_int((const int32_t *)draws->counter + column);
    vu key = (vu)load_int((const int32_t *)draws->key + column);
    return mix(mix(counter + (uint32_t)feature * GOLDEN) ^ key);
}
INLINE vf dropout(vf y, const Draws *draws, int64_t column, int64_t feature) {
    return keep(drawn(draws, column, feature) >= draws->limit, y * draws->factor);
}
/* What may follow a layer: ReLU, dropout, as `flags` say. */
INLINE vf activate(vf y, int32_t flags, const Draws *draws, int64_t column,
                   int64_t feature) {
    if (flags & OP_RELU) y = relu(y);
    return flags & OP_DROPOUT ? dropout(y, draws, column, feature) : y;
}

#endif
