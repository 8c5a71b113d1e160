/* The update of a step that computes the gradients of matrices itself: a few rows at a
 * time, all micro-batches up the tree, then the optimizer, while the sums are in the
 * nearest caches. So no gradient of a matrix is ever written to memory. */

#define STRIP 512 /* columns that are summed before their update */

/* The same place in the vectors that the update changes. */
typedef struct {
    float *parameters, *state1, *state2;
} Element;

INLINE Element element_of(const Update *u, int64_t element) {
    return (Element){u->parameters + element, u->state1 ? u->state1 + element : NULL,
                   u->state2 ? u->state2 + element : NULL};
}

/* The `count` tiles that were taken, columns [column, end): their sums, then their
 * update. */
static void update_strip(const Update *u, const Optimizer *how, WeightGradient *g,
                         int64_t start, int64_t count, int64_t column, int64_t end) {
    int64_t row = g->row[0];
    g->place = -(row * STRIP + column);
    sum_strip(g, count, column, end);
    for (int64_t r = row; r < g->row[count]; r++) {
        Halves sum = {g->sums[0] + (r - row) * STRIP, NULL};
        int64_t first = start + r * g->in + column;
        Element at = element_of(u, first);
        update_and_hash(how, sum, at.parameters, at.state1, at.state2, first,
                        end - column, u->hashes);
    }
}

static void update_matrix(const Update *u, const UpdatePart *part) {
    const Op *op = &u->ops[part->op];
    WeightGradient g = weight_gradient(op, u->call, u->micro_batches,
                                       u->num_micro_batches, part->first, part->end);
    Chain chains[list_chains(&g, NULL)];
    float room[take_chains(&g, chains) + LINE];
    float sums[g.together * TILE_ROWS * STRIP + LINE];
    float *const all[] = {align(sums)};
    g.stack = align(room);
    g.sums = all;
    g.step = STRIP;
    for (int64_t n = 0; n < g.tiles; n += g.together) {
        int64_t count = smaller(g.together, g.tiles - n);
        take_rows(&g, n, n + count);
        for (int64_t column = 0; column < g.in; column += STRIP)
            update_strip(u, &u->optimizers[part->group], &g, op->i[4], count, column,
                         smaller(column + STRIP, g.in));
    }
}

static void update_elements(const Update *u, const UpdatePart *part) {
    int64_t count = (u->order_size + 1) / 2; /* a tree of n leaves has n - 1 sums */
    const float *leaves[count];
    for (int64_t n = 0; n < count; n++) leaves[n] = u->leaves[n] + part->first;
    Element at = element_of(u, part->first);
    update(&u->optimizers[part->group], leaves, u->order, u->order_size, at.parameters,
           at.state1, at.state2, part->first, part->end - part->first, u->hashes);
}

static void update_parts(const Update *u) {
    for (int64_t n = 0; n < u->num_parts; n++) {
        const UpdatePart *part = &u->parts[n];
        if (part->op < 0)
            update_elements(u, part);
        else if (part->first < part->end)
            update_matrix(u, part);
    }
}
