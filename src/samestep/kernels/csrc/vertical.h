/* Products of matrices whose elements are vectors, a lane for each sample: a tile of at
 * most BLOCK_ROWS x BLOCK_COLUMNS chains is kept in registers while k runs. Nothing is
 * shuffled or broadcast, so matrices may lie with any strides. */
#ifndef VERTICAL_H
#define VERTICAL_H

#include "vector.h"

#if VW == 16 || defined(__aarch64__)
#define BLOCK_ROWS 4 /* 16 of 32 registers hold sums; loads are half of the fma */
#define BLOCK_COLUMNS 4
#elif VW == 8
#define BLOCK_ROWS 4 /* 12 sums, 3 of b and one of a: 16 of 16 */
#define BLOCK_COLUMNS 3
#else
#define BLOCK_ROWS 2 /* the software fma needs the registers */
#define BLOCK_COLUMNS 4
#endif

/* A matrix; strides in floats. */
typedef struct {
    float *at;
    int64_t row, column;
} Matrix;

INLINE Matrix matrix_at(Matrix m, int64_t row, int64_t column) {
    m.at += row * m.row + column * m.column;
    return m;
}
INLINE Matrix transposed(Matrix m) { return (Matrix){m.at, m.column, m.row}; }

/* What becomes of the chains: they are the result; they go on from it; or they are
 * added to it, as another block of terms. */
typedef enum { BEGIN, CONTINUE, ADD } Chaining;

/* c[i, j] = chain over k of a[i, k] b[k, j]. */
INLINE void multiply_block(Matrix c, Matrix a, Matrix b, int64_t terms,
                           Chaining chaining, int rows, int columns) {
    vf sums[BLOCK_ROWS][BLOCK_COLUMNS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < columns; j++)
            sums[i][j] = chaining == CONTINUE ? load(matrix_at(c, i, j).at) : (vf){0};
    for (int64_t k = 0; k < terms; k++, a.at += a.column, b.at += b.row) {
        vf row[BLOCK_COLUMNS];
        UNROLL for (int j = 0; j < columns; j++) row[j] = load(b.at + j * b.column);
        UNROLL for (int i = 0; i < rows; i++) {
            vf x = load(a.at + i * a.row);
            UNROLL for (int j = 0; j < columns; j++)
                sums[i][j] = fma_(x, row[j], sums[i][j]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < columns; j++) {
            float *to = matrix_at(c, i, j).at;
            store(to, chaining == ADD ? load(to) + sums[i][j] : sums[i][j]);
        }
}

typedef void (*MultiplyBlock)(Matrix c, Matrix a, Matrix b, int64_t terms,
                              Chaining chaining);
#define BLOCK(rows, columns)                                                     \
    static void block_##rows##x##columns(Matrix c, Matrix a, Matrix b,           \
                                         int64_t terms, Chaining chaining) {     \
        multiply_block(c, a, b, terms, chaining, rows, columns);                 \
    }
#define NAME_BLOCK(rows, columns) block_##rows##x##columns,
#if BLOCK_COLUMNS == 4
#define EACH_BLOCK_COLUMN(X, r) X(r, 1) X(r, 2) X(r, 3) X(r, 4)
#else
#define EACH_BLOCK_COLUMN(X, r) X(r, 1) X(r, 2) X(r, 3)
#endif
#define BLOCKS(rows) EACH_BLOCK_COLUMN(BLOCK, rows)
#define NAMES(rows) {EACH_BLOCK_COLUMN(NAME_BLOCK, rows)},
#if BLOCK_ROWS == 4
#define EACH_BLOCK(X) X(1) X(2) X(3) X(4)
#else
#define EACH_BLOCK(X) X(1) X(2)
#endif
EACH_BLOCK(BLOCKS)
static const MultiplyBlock blocks[BLOCK_ROWS][BLOCK_COLUMNS] = {EACH_BLOCK(NAMES)};

/* c [rows, columns] from a [rows, terms] and b [terms, columns]: one chain for each
 * element, so at most K_BLOCK terms, or several calls. A block of columns of b stays in
 * the nearest cache while the rows of a pass by. */
static void multiply_vectors(Matrix c, Matrix a, Matrix b, int64_t rows,
                             int64_t columns, int64_t terms, Chaining chaining) {
    for (int64_t j = 0; j < columns; j += BLOCK_COLUMNS) {
        int64_t width = columns - j < BLOCK_COLUMNS ? columns - j : BLOCK_COLUMNS;
        for (int64_t i = 0; i < rows; i += BLOCK_ROWS) {
            int64_t height = rows - i < BLOCK_ROWS ? rows - i : BLOCK_ROWS;
            blocks[height - 1][width - 1](matrix_at(c, i, j), matrix_at(a, i, 0),
                                          matrix_at(b, 0, j), terms, chaining);
        }
    }
}

/* The same with any number of terms: blocks of K_BLOCK, added in order. */
static void multiply_all(Matrix c, Matrix a, Matrix b, int64_t rows, int64_t columns,
                         int64_t terms) {
    for (int64_t k = 0; k == 0 || k < terms; k += K_BLOCK)
        multiply_vectors(c, matrix_at(a, 0, k), matrix_at(b, k, 0), rows, columns,
                         terms - k < K_BLOCK ? terms - k : K_BLOCK, k ? ADD : BEGIN);
}

#endif
