/* Reading a training from a file: every size is checked against what the file has left,
 * so that no more memory is taken than it has bytes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"

static FILE *file;
static int64_t left; /* bytes of the file that were not read yet */

void require(int condition, const char *rule) {
    if (condition) return;
    fprintf(stderr, "The file is damaged or of another version: %s.\n", rule);
    exit(2);
}

void *allocate(int64_t count, int64_t size) {
    void *made = calloc((size_t)(count ? count : 1), (size_t)size);
    if (!made) {
        fprintf(stderr, "There is not enough memory for this training.\n");
        exit(1);
    }
    return made;
}

static void read_into(void *to, int64_t count, int64_t size) {
    require(count <= left / size, "it ends too early");
    left -= count * size;
    require(fread(to, (size_t)size, (size_t)count, file) == (size_t)count,
            "it cannot be read");
}

static void *read_array(int64_t count, int64_t size) {
    require(count <= left / size, "it ends too early");
    void *made = allocate(count, size);
    read_into(made, count, size);
    return made;
}

static void check_header(const Header *h) {
    require(memcmp(h->magic, "SAMESTEP", 8) == 0, "it does not begin with SAMESTEP");
    require(h->version == FILE_VERSION, "the version of the format");
    require(h->specification == SAMESTEP_SPECIFICATION,
            "the version of the arithmetic");
    const int64_t *numbers = &h->ops;
    for (const int64_t *n = numbers; n <= &h->steps; n++)
        require(*n >= 0 && *n <= MOST, "a size is negative or too large");
    require(h->capacity > 0 && h->capacity % PANEL == 0, "the capacity");
    require(h->micro_batches > 0, "the number of micro-batches");
    require(h->tail >= h->parameters, "the tail begins within the parameters");
    require(h->element == 1 || h->element == 4 || h->element == 8,
            "the kind of the data");
    require(h->positions > 0 && (h->positions == 1 || h->values == 0),
            "the number of positions");
}

/* The stack of sums must end with one, and the kernels' room is for 64. */
static void check_merges(const Training *t) {
    int64_t size = 0;
    for (int64_t m = 0; m < t->header.micro_batches; m++) {
        size++;
        require(size <= 64 && t->merges[m] >= 0 && t->merges[m] < size, "a merge");
        size -= t->merges[m];
    }
    require(size == 1, "the micro-batches do not have one sum");
}

static int is_within(int64_t start, int64_t size, int64_t whole) {
    return start >= 0 && size >= 0 && start <= whole && size <= whole - start;
}

static void check_ranges(const Training *t) {
    const Header *h = &t->header;
    const int64_t whole[NUM_SOURCES] = {h->text, h->parameters, h->running,
                                        h->parameters};
    int64_t total = 0, constants = 0;
    for (int64_t b = 0; b < h->buffers; b++) {
        require(is_within(0, t->sizes[b], 8 * MOST - total), "the size of a buffer");
        require(is_within(0, t->constant_sizes[b], t->sizes[b]), "a constant's size");
        total += t->sizes[b], constants += t->constant_sizes[b];
    }
    require(constants == h->constants, "the constants");
    for (int64_t g = 0; g < h->groups; g++)
        require(is_within(t->groups[g].start, t->groups[g].size, h->parameters),
                "a group of parameters");
    for (int64_t p = 0; p < h->pieces; p++) {
        const Piece *piece = &t->pieces[p];
        require(piece->source >= 0 && piece->source < NUM_SOURCES, "a piece's source");
        require(is_within(piece->start, piece->size, whole[piece->source]), "a piece");
    }
}

void open_training(Training *t, const char *path) {
    file = fopen(path, "rb");
    require(file && fseek(file, 0, SEEK_END) == 0, "it cannot be opened");
    left = ftell(file);
    rewind(file);
    Header *h = &t->header;
    read_into(h, 1, sizeof *h);
    check_header(h);
    t->ops = read_array(h->ops, sizeof(Op));
    t->sizes = read_array(h->buffers, sizeof(int64_t));
    t->constant_sizes = read_array(h->buffers, sizeof(int64_t));
    t->constants = read_array(h->constants, sizeof(float));
    t->merges = read_array(h->micro_batches, sizeof(int64_t));
    t->parameters = read_array(h->parameters, sizeof(float));
    t->running = read_array(h->running, sizeof(float));
    t->fixed = read_array(h->fixed, sizeof(float));
    t->data = read_array(h->rows * h->features, h->element);
    t->targets = h->values ? read_array(h->rows * h->values, sizeof(float))
                           : read_array(h->rows * h->positions, sizeof(int64_t));
    t->groups = read_array(h->groups, sizeof(Group));
    t->pieces = read_array(h->pieces, sizeof(Piece));
    t->text = read_array(h->text, 1);
    check_merges(t);
    check_ranges(t);
    int64_t step = (int64_t)sizeof(StepNumbers) + 8 * (2 * h->micro_batches + 1) +
                   8 * h->capacity + (int64_t)sizeof(Optimizer) * h->groups;
    require(left == h->steps * step, "the size of the steps");
    t->starts = allocate(h->micro_batches + 1, sizeof(int64_t));
    t->keys = allocate(h->micro_batches, sizeof(uint64_t));
    t->indices = allocate(h->capacity, sizeof(int64_t));
    t->optimizers = allocate(h->groups, sizeof(Optimizer));
}

void read_step(Training *t) {
    const Header *h = &t->header;
    read_into(&t->step, 1, sizeof t->step);
    read_into(t->starts, h->micro_batches + 1, sizeof(int64_t));
    read_into(t->keys, h->micro_batches, sizeof(uint64_t));
    read_into(t->indices, h->capacity, sizeof(int64_t));
    read_into(t->optimizers, h->groups, sizeof(Optimizer));
    int64_t samples = t->step.samples;
    require(samples >= 0 && samples <= h->capacity, "the samples of a step");
    require(t->starts[0] == 0 && t->starts[h->micro_batches] == samples, "the starts");
    for (int64_t m = 0; m < h->micro_batches; m++)
        require(t->starts[m] <= t->starts[m + 1], "the starts");
    for (int64_t s = 0; s < samples; s++)
        require(t->indices[s] >= 0 && t->indices[s] < h->rows, "a sample's index");
}

void close_training(Training *t) {
    void *arrays[] = {t->ops,     t->sizes,  t->constant_sizes, t->constants,
                      t->merges,  t->data,   t->parameters,     t->running,
                      t->targets, t->groups, t->pieces,         t->text,
                      t->starts,  t->keys,   t->indices,        t->optimizers,
                      t->fixed};
    for (size_t n = 0; n < sizeof arrays / sizeof *arrays; n++) free(arrays[n]);
    fclose(file);
}
