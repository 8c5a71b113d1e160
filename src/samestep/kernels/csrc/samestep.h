/* The interface of the kernels: programs, what one call of a program needs, and the
 * few kernels that are called by themselves. docs/arithmetic.md defines every result.
 *
 * Panels. A matrix of activations [rows, columns] is stored as panels of 32 columns:
 * element (r, c) is at (c / 32) * rows_allocated * 32 + r * 32 + c % 32. Two matrices
 * are stored that way: "by feature", [features, samples], whose rows_allocated is the
 * number of features, and "by sample", [samples, features], whose rows_allocated is
 * `capacity`. Columns beyond the last are padding: kernels may compute them, nothing
 * reads them. No pointer needs any alignment beyond that of its type. */
#ifndef SAMESTEP_H
#define SAMESTEP_H

#include <stdint.h>

#define SAMESTEP_SPECIFICATION 1 /* of the arithmetic: docs/arithmetic.md */
#define SAMESTEP_INTERFACE 4     /* of this header */
#define PANEL 32                 /* columns of a panel */
/* Parts of the specification. */
#define K_BLOCK 256     /* terms of a block of a sum */
#define LANES 16        /* of a block of a reduction */
#define NORM_BLOCK 1024 /* elements of a block of a squared norm */
#define HASH_BLOCK 1024 /* words of a block of a hash */

#include "operations.h"

/* One operation. `i` holds numbers of buffers, sizes and offsets (in elements), in the
 * order of the comments in operations.h; unused ones are 0. 312 bytes, little-endian in
 * files. */
typedef struct {
    int32_t kind;
    int32_t flags;
    int64_t i[36];
    float f[4];
} Op;

/* What one call needs besides the program. Micro-batch m has the columns
 * [starts[m], starts[m + 1]); starts[0] is 0. */
typedef struct {
    float *const *buffers;     /* activations and constants, by number */
    const float *parameters;   /* the vector of all parameters */
    const float *running;      /* BatchNorm's running statistics before the step */
    int64_t capacity;          /* samples that buffers have room for: whole panels */
    int64_t micro_batches;     /* of this worker, at least 1 */
    const int64_t *starts;     /* [micro_batches + 1] */
    const int64_t *merges;     /* [micro_batches]: sums that each completes */
    const uint64_t *keys;      /* [micro_batches]: of dropout */
    float weight;              /* of a sample's loss in the gradient */
    int32_t slots_size;        /* how many slots there are */
    float *const *slots;       /* [slots_size] of [parameters | tail]: a sum each */
    int64_t tail;              /* where a slot's tail begins */
    const uint8_t *bytes;      /* [*, features], for OP_GATHER_BYTES */
    const int64_t *indices;    /* [samples]: rows of `bytes` */
    const float *inputs;       /* [samples, features], for OP_LOAD */
    const int64_t *labels;     /* [samples, positions], or NULL */
    const float *targets;      /* [samples, values], or NULL */
    float *losses;             /* [samples, positions], or [samples, cells] */
    float *metrics;            /* the same: 1 for a right answer, or absolute errors */
    double *loss_sums;         /* [micro_batches (, cells)]: of the losses, in double */
    double *metric_sums;       /* [micro_batches] */
    int64_t *answers;          /* the same: classes with the largest logit, or NULL */
    float *outputs;            /* [samples, features], for OP_STORE */
    const int64_t *partners;   /* [samples]: labels that are mixed in, or NULL */
    const float *shares;       /* [samples]: of `labels`, the rest is the partners' */
    const int64_t *tokens;     /* [samples, positions], for OP_LOAD_TOKENS */
    const float *constants;    /* what training does not change, from CONSTANTS on */
} Call;

/* The first place of a constant. Smaller ones are places in the parameters. */
#define CONSTANTS ((int64_t)1 << 40)

static inline const float *weights_at(const Call *call, int64_t place) {
    return place < CONSTANTS ? call->parameters + place
                             : call->constants + (place - CONSTANTS);
}

/* Elementwise update of parameters [size] by the sum of partial gradients. */
typedef enum { SGD, ADAM, ADAMW } OptimizerKind;

typedef struct {
    int32_t kind;
    int32_t nesterov;
    int32_t is_first;    /* SGD: the momentum begins with the gradient */
    float lr;            /* SGD: learning rate; Adam: lr / (1 - beta1^t) */
    float weight_decay;  /* ADAMW: the factor 1 - lr * weight_decay */
    float beta1;         /* SGD: momentum */
    float beta2;
    float one_minus_beta1, one_minus_beta2;
    float root;          /* 1 / sqrt(1 - beta2^t) */
    float eps;
} Optimizer;

/* Hashes of what an update was given and what it left; each update adds to them. */
typedef struct {
    const uint32_t *keys; /* [HASH_BLOCK + 17]: those behind the block are not used */
    uint64_t gradient, parameters;
} Hashes;

/* Where the samples of a micro-batch lie: columns [first, end) of buffers that begin
 * `distance` floats after this worker's, in the memory of the worker that owns it. */
typedef struct {
    int64_t distance, first, end;
    int64_t merges; /* sums of the tree that it completes */
} MicroBatch;

/* What one worker updates: with `op` >= 0, the rows [first, end) of the matrix whose
 * gradient is that operation, an OP_LINEAR_GRAD_WEIGHT; else, with -1, the elements
 * [first, end) of the vectors. `group` is the number of its optimizer. */
typedef struct {
    int64_t op, first, end, group;
} UpdatePart;

/* An update that computes the gradients of matrices itself, of all micro-batches of the
 * step. Vectors are whole: they begin with the first parameter. */
typedef struct {
    const Op *ops;
    const Call *call; /* of this worker: its buffers and their capacity */
    const MicroBatch *micro_batches; /* in the order of the tree */
    int64_t num_micro_batches;
    const UpdatePart *parts;
    int64_t num_parts;
    const Optimizer *optimizers;
    const float *const *leaves; /* of the other gradients' sum, as for `update` */
    const int32_t *order;
    int64_t order_size;
    float *parameters, *state1, *state2;
    Hashes *hashes; /* or NULL */
} Update;

/* The kernels of one instruction set. */
typedef struct {
    const char *isa;
    /* Run a program. Returns 0, or 1 + the number of an operation that is unknown. */
    int64_t (*run)(const Op *ops, int64_t num_ops, const Call *call);
    /* out = sum of the leaves in `order`, a postfix program: n >= 0 pushes leaf n, -1
     * adds the two on top. `out` may be one of the leaves. */
    void (*tree_sum)(float *out, const float *const *leaves, const int32_t *order,
                     int64_t order_size, int64_t size);
    /* The same sum, and the update with it, in one pass. state1, state2: momentum, or
     * both averages of Adam. `first` is the place of the first element among all
     * parameters, for the hashes, which may be NULL. */
    void (*update)(const Optimizer *how, const float *const *leaves,
                   const int32_t *order, int64_t order_size, float *parameters,
                   float *state1, float *state2, int64_t first, int64_t size,
                   Hashes *hashes);
    void (*update_parts)(const Update *update);
    /* average = fma(weight, parameters - average, average) */
    void (*average)(float *average, const float *parameters, float weight,
                    int64_t size);
    /* squares[b] = the squared norm of block b of 1,024 elements, in float64. */
    void (*squared_norms)(const float *vector, double *squares, int64_t blocks);
    void (*scale)(float *vector, float factor, int64_t size);
    /* The hash of `size` words; `first` is the place of the first of them. */
    uint64_t (*hash)(const uint32_t *keys, const float *words, int64_t first,
                     int64_t size);
    /* One function on an array, for tests and for own modules: "exp", "log", ... are
     * numbered as in functions.h. Returns -1 for an unknown number. */
    int (*function)(int32_t number, const float *x, float *y, int64_t size);
} Kernels;

/* Exported symbols; everything else is compiled with -fvisibility=hidden. */
#if defined(_WIN32)
#define SAMESTEP_EXPORT __declspec(dllexport)
#else
#define SAMESTEP_EXPORT __attribute__((visibility("default")))
#endif

SAMESTEP_EXPORT int32_t samestep_specification(void);
SAMESTEP_EXPORT int32_t samestep_interface(void);
/* The digest of the sources that the library was compiled from (compiling.py). */
SAMESTEP_EXPORT const char *samestep_sources(void);
/* Choose the kernels: an instruction set by name, or NULL for the best that this
 * processor has. NULL if it is unknown, not compiled in or not supported. */
SAMESTEP_EXPORT const Kernels *samestep_kernels(const char *isa);
/* The names of the instruction sets that are compiled in, the best first, NULL last. */
SAMESTEP_EXPORT const char *const *samestep_isas(void);

#endif
