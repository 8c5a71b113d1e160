/* A float32 product in the order of docs/arithmetic.md, on CUDA cores.
 *
 * c[m, n] = sum over k of a[m, k] b[k, n]. Every element is computed by one thread: a
 * chain of fma over each block of 256 terms, then the blocks' sums in order. Which
 * elements a thread, a tile or a grid computes touches none of these chains.
 *
 * A block of 16 x 16 threads computes a tile of 128 x 128. While it multiplies 8 terms
 * that lie in shared memory, it fetches the next 8. In the language that C and CUDA have
 * in common: on_host.h makes a program for the CPU of it. */

enum { SIDE = 128, DEPTH = 8, OWN = 8, THREADS = 256, BLOCK = 256 };
enum { FETCHED = SIDE * DEPTH / THREADS, ROW = SIDE + 4 };

/* A factor: element (i, k) lies at i * step + k * term_step. */
typedef struct {
    const float *x;
    int size, terms, step, term_step;
} Factor;

/* Which of a tile's elements a thread fetches: neighbours lie side by side. */
static __device__ __forceinline__ int element(int n, int *term, int is_by_term) {
    int at = n * THREADS + threadIdx.x;
    *term = is_by_term ? at % DEPTH : at / SIDE;
    return is_by_term ? at / DEPTH : at % SIDE;
}

static __device__ __forceinline__ void fetch(float *fetched, const Factor *f, int first,
                                             int first_term) {
    #pragma unroll
    for (int n = 0; n < FETCHED; n++) {
        int term, i = first + element(n, &term, f->term_step == 1);
        term += first_term;
        int is_inside = i < f->size && term < f->terms;
        fetched[n] = is_inside ? f->x[(long long)i * f->step +
                                      (long long)term * f->term_step] : 0;
    }
}

static __device__ __forceinline__ void put(float (*tile)[ROW], const float *fetched,
                                           const Factor *f) {
    #pragma unroll
    for (int n = 0; n < FETCHED; n++) {
        int term, i = element(n, &term, f->term_step == 1);
        tile[term][i] = fetched[n];
    }
}

/* The n-th row or column of a thread's 8: two groups of 4, so that 16 threads read 64
 * floats that lie side by side. */
static __device__ __forceinline__ int own(int thread, int n) {
    return n / 4 * (SIDE / 2) + thread * 4 + n % 4;
}

static __device__ __forceinline__ void read_own(float *values, const float *row,
                                                int thread) {
    #pragma unroll
    for (int n = 0; n < OWN; n += 4) {
        float4 four = *(const float4 *)(row + own(thread, n));
        values[n] = four.x, values[n + 1] = four.y;
        values[n + 2] = four.z, values[n + 3] = four.w;
    }
}

static __device__ __forceinline__ void add_term(float (*sums)[OWN], const float *a,
                                                const float *b) {
    float left[OWN], right[OWN];
    read_own(left, a, threadIdx.x / 16);
    read_own(right, b, threadIdx.x % 16);
    #pragma unroll
    for (int m = 0; m < OWN; m++)
        #pragma unroll
        for (int n = 0; n < OWN; n++)
            sums[m][n] = fmaf(left[m], right[n], sums[m][n]);
}

/* Where a tile lies in the result. */
typedef struct {
    float *c;
    int row, column, rows, columns;
} Tile;

/* End a block of terms. The first is the total as it is: +0 + -0 would be +0. Totals
 * wait in the result: in registers, one block of threads less would fit on a core. */
static __device__ __forceinline__ void end_block(const Tile *tile, float (*sums)[OWN],
                                                 int is_first) {
    #pragma unroll
    for (int m = 0; m < OWN; m++)
        #pragma unroll
        for (int n = 0; n < OWN; n++) {
            int i = tile->row + own(threadIdx.x / 16, m);
            int j = tile->column + own(threadIdx.x % 16, n);
            if (i < tile->rows && j < tile->columns) {
                float *total = tile->c + (long long)i * tile->columns + j;
                *total = is_first ? sums[m][n] : *total + sums[m][n];
            }
            sums[m][n] = 0;
        }
}

KERNEL void __launch_bounds__(THREADS, 2)
    product(const float *a, const float *b, float *c, int rows, int columns, int terms,
            int a_step, int a_term_step, int b_step, int b_term_step) {
    __shared__ __align__(16) float left[2][DEPTH][ROW], right[2][DEPTH][ROW];
    Factor f = {a, rows, terms, a_step, a_term_step};
    Factor g = {b, columns, terms, b_step, b_term_step};
    Tile tile = {c, blockIdx.y * SIDE, blockIdx.x * SIDE, rows, columns};
    float sums[OWN][OWN] = {{0}}, of_left[FETCHED], of_right[FETCHED];
    fetch(of_left, &f, tile.row, 0), fetch(of_right, &g, tile.column, 0);
    for (int first = 0, half = 0; first < terms; first += DEPTH, half ^= 1) {
        put(left[half], of_left, &f), put(right[half], of_right, &g);
        __syncthreads();
        fetch(of_left, &f, tile.row, first + DEPTH);
        fetch(of_right, &g, tile.column, first + DEPTH);
        if (first + DEPTH <= terms) {
            #pragma unroll
            for (int k = 0; k < DEPTH; k++)
                add_term(sums, left[half][k], right[half][k]);
        } else { /* no further term: fma(0, 0, -0) would be +0 */
            for (int k = 0; k < terms - first; k++)
                add_term(sums, left[half][k], right[half][k]);
        }
        if ((first + DEPTH) % BLOCK == 0 || first + DEPTH >= terms)
            end_block(&tile, sums, first < BLOCK);
    }
    if (terms == 0) end_block(&tile, sums, 1);
}
