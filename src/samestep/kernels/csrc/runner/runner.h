/* A training in a file: a program, its data, and the numbers of every step.
 *
 * program_file.py writes such files; its docstring is the format. What is read comes
 * from anywhere: every size and every number of an operation is checked before use. */
#ifndef RUNNER_H
#define RUNNER_H

#include <stddef.h>
#include <stdint.h>

#include "../samestep.h"

#define FILE_VERSION 3
#define MOST ((int64_t)1 << 28) /* of any number in the header: products fit 64 bits */

enum { TEXT, PARAMETERS, RUNNING, AVERAGE, NUM_SOURCES };

/* The header. All numbers of a file are little-endian, as are the processors. */
typedef struct {
    char magic[8]; /* "SAMESTEP" */
    int64_t version, specification;
    int64_t ops, buffers, constants; /* constants: floats of all buffers */
    int64_t capacity, micro_batches;
    int64_t parameters, running, tail;
    int64_t rows, features, element; /* of the data; element: bytes of one, 1, 4 or 8 */
    int64_t values;                  /* of a row's target, 0 for labels */
    int64_t positions;               /* of which each has a label */
    int64_t fixed;                   /* floats that training does not change */
    int64_t groups, pieces, text, steps;
} Header;

/* A range of the parameters with its own optimizer numbers. */
typedef struct {
    int64_t start, size;
} Group;

/* What the fingerprint consists of: a range of the text or of a vector. */
typedef struct {
    int64_t source, start, size;
} Piece;

typedef struct {
    int64_t samples;
    double max_norm; /* 0: gradients are not clipped */
    float weight, average_weight;
    int32_t average; /* 0: none, 1: the average begins with the weights, 2: it moves */
    float factor;    /* of the gradient, before it is clipped */
} StepNumbers;

typedef struct {
    Header header;
    Op *ops;
    int64_t *sizes, *constant_sizes;
    float *constants;
    int64_t *merges;
    float *parameters, *running, *fixed;
    uint8_t *data; /* bytes, float32, or tokens int64 */
    void *targets; /* labels int64 [rows, positions], or float32 [rows, values] */
    Group *groups;
    Piece *pieces;
    char *text;
    /* Of the step that was read last. */
    StepNumbers step;
    int64_t *starts;
    uint64_t *keys;
    int64_t *indices;
    Optimizer *optimizers;
} Training;

/* Read everything but the steps; then one step; then the end. They exit with a message
 * if the file is damaged. */
void open_training(Training *training, const char *path);
void read_step(Training *training);
void close_training(Training *training);

/* Exit with a message unless all operations stay within their buffers. */
void check_ops(const Training *training);

void require(int condition, const char *rule);
void *allocate(int64_t count, int64_t size);

typedef struct {
    uint32_t state[8];
    uint64_t bytes;
    uint8_t block[64];
} Sha256;

void sha256_begin(Sha256 *digest);
void sha256_add(Sha256 *digest, const void *data, int64_t size);
/* Print the name and the digest in hexadecimal. */
void sha256_print(Sha256 *digest, const char *name);

#endif
