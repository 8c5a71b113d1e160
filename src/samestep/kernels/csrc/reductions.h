/* Sums over the samples of a micro-batch, and over micro-batches up the tree into the
 * slots. */
#ifndef REDUCTIONS_H
#define REDUCTIONS_H

#include "samestep.h"
#include "vector.h"

/* The sixteen lanes of a block of a reduction. */
typedef struct {
    vf part[LANES / VW];
} Lanes;

INLINE Lanes lanes_at(const float *p) {
    Lanes lanes;
    for (int j = 0; j < LANES / VW; j++) lanes.part[j] = load(p + j * VW);
    return lanes;
}
INLINE Lanes add_lanes(Lanes a, Lanes b) {
    for (int j = 0; j < LANES / VW; j++) a.part[j] += b.part[j];
    return a;
}
/* +0 in lanes from n on, which adds nothing: no lane of a sum is ever -0. */
INLINE Lanes first_of(Lanes lanes, int64_t n) {
    for (int j = 0; j < LANES / VW; j++)
        lanes.part[j] = keep(iota() < (int32_t)n - j * VW, lanes.part[j]);
    return lanes;
}

/* Lane l + 8 to lane l, then l + 4, l + 2, l + 1. */
INLINE float sum_of(Lanes lanes) {
    typedef float quad __attribute__((vector_size(16)));
    float all[LANES] __attribute__((aligned(64)));
    for (int j = 0; j < LANES / VW; j++) store(all + j * VW, lanes.part[j]);
    const quad *q = (const quad *)all;
    quad four = (q[0] + q[2]) + (q[1] + q[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* Columns [column, column + n), n <= 16, of one feature; `row` is its row of the first
 * panel, `step` the distance to that of the next. The other lanes are +0. */
INLINE Lanes load_columns(const float *row, int64_t step, int64_t column, int64_t n) {
    int64_t place = column % PANEL;
    const float *p = row + column / PANEL * step + place;
    if (n == LANES && place <= PANEL - LANES) return lanes_at(p);
    float some[LANES] = {0};
    int64_t here = n < PANEL - place ? n : PANEL - place;
    for (int64_t l = 0; l < here; l++) some[l] = p[l];
    for (int64_t l = here; l < n; l++) some[l] = p[step - place + l - here];
    return lanes_at(some);
}
INLINE void store_columns(float *row, int64_t step, int64_t column, int64_t n,
                          Lanes lanes) {
    int64_t place = column % PANEL;
    float *p = row + column / PANEL * step + place, some[LANES];
    int is_whole = n == LANES && place <= PANEL - LANES;
    for (int j = 0; j < LANES / VW; j++)
        store((is_whole ? p : some) + j * VW, lanes.part[j]);
    if (is_whole) return;
    int64_t here = n < PANEL - place ? n : PANEL - place;
    for (int64_t l = 0; l < here; l++) p[l] = some[l];
    for (int64_t l = here; l < n; l++) p[step - place + l - here] = some[l];
}

/* The sums of one element of a slot on their way up the tree: a stack of those that
 * wait for their partner. Its lowest values stay where they end, in the slots; no more
 * than 64 lie above them, as the tree of 2^63 leaves is no deeper. */
typedef struct {
    const Call *call;
    int64_t place; /* of the element in a slot */
    int64_t size;
    float above[64];
} TreeSums;

INLINE void begin_sum(TreeSums *sums, const Call *call, int64_t place) {
    sums->call = call, sums->place = place, sums->size = 0;
}
INLINE float *sum_at(TreeSums *sums, int64_t i) {
    int64_t num_slots = sums->call->slots_size;
    return i < num_slots ? sums->call->slots[i] + sums->place
                         : sums->above + (i - num_slots);
}
/* Add the value of micro-batch m, which is the next. */
INLINE void push_sum(TreeSums *sums, int64_t m, float value) {
    for (int64_t merges = sums->call->merges[m]; merges > 0; merges--)
        value = *sum_at(sums, --sums->size) + value;
    *sum_at(sums, sums->size++) = value;
}

#endif
