/* Runs a training from a file, without Python: `samestep-runner FILE`.
 *
 * Prints the SHA-256 of the weights and of all losses. One worker computes all
 * micro-batches; any other number of workers has the same bits. SAMESTEP_ISA chooses
 * the instruction set. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"

/* What a training holds besides its file. */
typedef struct {
    const Kernels *kernels;
    Call call;
    float **buffers;
    float *slot; /* of gradients, and after the tail of running statistics */
    float *state1, *state2, *average;
    uint8_t *inputs; /* the samples of a step, if they are floats */
    void *targets;   /* of the samples of a step */
    double *squares; /* of blocks of the gradient */
    int64_t blocks;
    Sha256 losses;
} Run;

static float **make_buffers(const Training *t) {
    float **buffers = allocate(t->header.buffers, sizeof *buffers);
    const float *constant = t->constants;
    for (int64_t b = 0; b < t->header.buffers; b++) {
        buffers[b] = allocate(t->sizes[b], sizeof(float));
        memcpy(buffers[b], constant, (size_t)t->constant_sizes[b] * sizeof(float));
        constant += t->constant_sizes[b];
    }
    return buffers;
}

static void make_run(Run *run, Training *t) {
    const Header *h = &t->header;
    run->buffers = make_buffers(t);
    run->blocks = (h->parameters + NORM_BLOCK - 1) / NORM_BLOCK;
    run->squares = allocate(run->blocks, sizeof(double));
    run->slot = allocate(h->tail + h->running, sizeof(float));
    run->state1 = allocate(h->parameters, sizeof(float));
    run->state2 = allocate(h->parameters, sizeof(float));
    run->average = allocate(h->parameters, sizeof(float));
    run->inputs = allocate(h->capacity * h->features, h->element);
    run->targets = allocate(h->capacity * (h->values ? h->values : h->positions), 8);
    sha256_begin(&run->losses);
    run->call = (Call){
        .buffers = run->buffers,
        .parameters = t->parameters,
        .running = t->running,
        .constants = t->fixed,
        .capacity = h->capacity,
        .micro_batches = h->micro_batches,
        .starts = t->starts,
        .merges = t->merges,
        .keys = t->keys,
        .slots_size = 1,
        .slots = &run->slot,
        .tail = h->tail,
        .bytes = t->data,
        .indices = t->indices,
        .inputs = (const float *)run->inputs,
        .labels = run->targets,
        .targets = run->targets,
        .tokens = (const int64_t *)run->inputs,
        .losses = allocate(h->capacity * h->positions, sizeof(float)),
        .metrics = allocate(h->capacity * h->positions, sizeof(float)),
        .loss_sums = allocate(h->micro_batches, sizeof(double)),
        .metric_sums = allocate(h->micro_batches, sizeof(double)),
    };
}

static void free_run(Run *run, int64_t buffers) {
    for (int64_t b = 0; b < buffers; b++) free(run->buffers[b]);
    void *arrays[] = {run->buffers, run->slot, run->state1, run->state2, run->average,
                      run->inputs, run->targets, run->squares, run->call.losses,
                      run->call.metrics, run->call.loss_sums, run->call.metric_sums};
    for (size_t n = 0; n < sizeof arrays / sizeof *arrays; n++) free(arrays[n]);
}

/* Copy the rows of a step's samples. */
static void pick(void *to, const void *from, const Training *t, int64_t size) {
    for (int64_t s = 0; s < t->step.samples; s++)
        memcpy((char *)to + s * size, (const char *)from + t->indices[s] * size,
               (size_t)size);
}

static void compute_gradients(Run *run, const Training *t) {
    const Header *h = &t->header;
    pick(run->targets, t->targets, t, h->values ? 4 * h->values : 8 * h->positions);
    if (h->element > 1) pick(run->inputs, t->data, t, h->element * h->features);
    run->call.weight = t->step.weight;
    int64_t failed = run->kernels->run(t->ops, h->ops, &run->call);
    require(failed == 0, "an operation is unknown");
    sha256_add(&run->losses, run->call.losses, 4 * t->step.samples * h->positions);
    sha256_add(&run->losses, run->call.loss_sums, 8 * h->micro_batches);
}

/* Add x to a list of doubles whose exact sum is kept: each is the rounding error of a
 * sum of larger ones (Shewchuk, 1997). Returns the new length: at most 40, for squares
 * of floats. */
static int add_exactly(double *parts, int size, double x) {
    int kept = 0;
    for (int n = 0; n < size; n++) {
        double y = parts[n], high = x + y;
        double low = fabs(x) < fabs(y) ? x - (high - y) : y - (high - x);
        if (low != 0) parts[kept++] = low;
        x = high;
    }
    parts[kept++] = x;
    return kept;
}

/* The exact sum, rounded once: of its parts, in increasing order, the largest two
 * decide unless they lie half-way between two numbers; then the third's sign does. */
static double rounded(const double *parts, int size) {
    double high = parts[--size], low = 0;
    while (size > 0 && low == 0) {
        double x = high, y = parts[--size];
        high = x + y;
        low = y - (high - x);
    }
    if (size > 0 && ((low < 0 && parts[size - 1] < 0) ||
                     (low > 0 && parts[size - 1] > 0))) {
        double twice = low * 2, next = high + twice;
        if (twice == next - high) high = next;
    }
    return high;
}

/* The gradient's norm, from the squares of blocks; the last is padded with zeros. */
static double norm_of(Run *run, int64_t size) {
    float last[NORM_BLOCK] = {0};
    int64_t whole = size / NORM_BLOCK, rest = size % NORM_BLOCK;
    run->kernels->squared_norms(run->slot, run->squares, whole);
    memcpy(last, run->slot + whole * NORM_BLOCK, (size_t)rest * sizeof(float));
    if (rest) run->kernels->squared_norms(last, run->squares + whole, 1);
    double parts[64] = {0};
    int kept = 1;
    for (int64_t b = 0; b < run->blocks; b++) {
        require(isfinite(run->squares[b]), "the gradient is not finite");
        kept = add_exactly(parts, kept, run->squares[b]);
    }
    return sqrt(rounded(parts, kept));
}

static void update_weights(Run *run, Training *t) {
    const Header *h = &t->header;
    const int32_t order[] = {0};
    if (t->step.factor != 1)
        run->kernels->scale(run->slot, t->step.factor, h->parameters);
    double norm = t->step.max_norm > 0 ? norm_of(run, h->parameters) : 0;
    if (norm > t->step.max_norm)
        run->kernels->scale(run->slot, (float)(t->step.max_norm / norm), h->parameters);
    for (int64_t g = 0; g < h->groups; g++) {
        int64_t start = t->groups[g].start;
        const float *leaves[] = {run->slot + start};
        run->kernels->update(&t->optimizers[g], leaves, order, 1, t->parameters + start,
                             run->state1 + start, run->state2 + start, start,
                             t->groups[g].size, NULL);
    }
    for (int64_t r = 0; r < h->running; r++)
        t->running[r] = run->slot[h->tail + r] / (float)h->micro_batches;
    if (t->step.average == 1)
        memcpy(run->average, t->parameters, (size_t)h->parameters * sizeof(float));
    if (t->step.average == 2)
        run->kernels->average(run->average, t->parameters, t->step.average_weight,
                              h->parameters);
}

static void print_fingerprint(const Run *run, const Training *t) {
    Sha256 weights;
    sha256_begin(&weights);
    const float *vectors[] = {NULL, t->parameters, t->running, run->average};
    for (int64_t p = 0; p < t->header.pieces; p++) {
        const Piece *piece = &t->pieces[p];
        if (piece->source == TEXT)
            sha256_add(&weights, t->text + piece->start, piece->size);
        else
            sha256_add(&weights, vectors[piece->source] + piece->start,
                       4 * piece->size);
    }
    sha256_print(&weights, "weights");
}

int main(int count, char **words) {
    if (count != 2) {
        fprintf(stderr, "usage: samestep-runner FILE\n");
        return 2;
    }
    Training training = {0};
    Run run = {.kernels = samestep_kernels(getenv("SAMESTEP_ISA"))};
    if (!run.kernels) {
        fprintf(stderr,
                "This processor has no kernels, or not those of SAMESTEP_ISA.\n");
        return 1;
    }
    open_training(&training, words[1]);
    check_ops(&training);
    make_run(&run, &training);
    for (int64_t n = 0; n < training.header.steps; n++) {
        read_step(&training);
        compute_gradients(&run, &training);
        update_weights(&run, &training);
    }
    print_fingerprint(&run, &training);
    sha256_print(&run.losses, "losses");
    free_run(&run, training.header.buffers);
    close_training(&training);
    return 0;
}
