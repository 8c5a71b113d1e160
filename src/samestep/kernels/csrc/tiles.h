/* A tile of a product: up to TILE_ROWS x TILE_VECTORS vectors of sums, kept in
 * registers while k runs, so that each step over k is a row of b, a column of a, and
 * nothing but fma. Lanes and rows are different outputs: how many there are touches no
 * sum. */
#if defined(__aarch64__)
#define TILE_ROWS 6 /* 24 of 32 registers hold sums */
#define TILE_VECTORS 4
#elif VW == 16
#define TILE_ROWS 12 /* 24 of 32 */
#define TILE_VECTORS 2
#elif VW == 8
#define TILE_ROWS 6 /* 12 of 16 */
#define TILE_VECTORS 2
#else
#define TILE_ROWS 2 /* the software fma needs the registers */
#define TILE_VECTORS 1
#endif
#define TILE_COLUMNS (TILE_VECTORS * VW)
#define TILE_SIZE (TILE_ROWS * PANEL) /* of a tile in memory: rows of PANEL floats */

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* c[r, 0..columns-1] = chain over k of a[r, k] b[k, :], added to the `merges` tiles
 * that end with `sums`, the last one first. */
typedef struct {
    const float *a;
    int64_t a_step; /* from one row to the next, or from one k to the next */
    const float *b; /* from one k to the next: PANEL */
    int64_t ahead;  /* by k: what to prefetch of `a` */
    int64_t terms;  /* how many k */
    int64_t until;  /* terms until `a` jumps; then again every PANEL terms */
    int64_t jump;
    const float *sums;
    int64_t merges;
    float *c;
    int64_t c_step, columns;
} Tile;

typedef vf Sums[TILE_ROWS][TILE_VECTORS];

/* Terms of one row at most: no jump. `row_step` is 1 where `a` lies by k. */
INLINE const float *sum_terms(Sums sums, const float *a, int64_t row_step,
                              int64_t k_step, int64_t ahead, const float *b,
                              int64_t terms, int rows, int vectors) {
    /* Rows in threes: an address may add once or twice a step, not three times. */
    const float *a3[(TILE_ROWS + 2) / 3];
    UNROLL for (int r = 0; r < rows; r += 3) a3[r / 3] = a + r * row_step;
    for (int64_t k = 0; k < terms; k++, b += PANEL) {
        vf row[TILE_VECTORS];
        /* By k, what follows in `a` may be no stream that a processor foresees; by row,
         * b may come from the second cache: two lines of each of its rows. */
        if (row_step == 1) {
            __builtin_prefetch(a3[0] + ahead);
        } else {
            __builtin_prefetch(b + 12 * PANEL);
            __builtin_prefetch(b + 12 * PANEL + PANEL / 2);
        }
        UNROLL for (int v = 0; v < vectors; v++) row[v] = load(b + v * VW);
        UNROLL for (int r = 0; r < rows; r++) {
            vf x = splat(a3[r / 3][r % 3 * row_step]);
            UNROLL for (int v = 0; v < vectors; v++)
                sums[r][v] = fma_(x, row[v], sums[r][v]);
        }
        UNROLL for (int r = 0; r < rows; r += 3) a3[r / 3] += k_step;
    }
    return a3[0];
}

INLINE void store_sums(Sums sums, const Tile *t, int rows, int vectors) {
    int64_t rest = t->columns - (vectors - 1) * VW;
    UNROLL for (int r = 0; r < rows; r++) {
        float *c = t->c + r * t->c_step;
        UNROLL for (int v = 0; v < vectors - 1; v++) store(c + v * VW, sums[r][v]);
        float *last = c + (vectors - 1) * VW;
        if (rest == VW)
            store(last, sums[r][vectors - 1]);
        else
            store_part(last, sums[r][vectors - 1], rest);
    }
}

INLINE void fill_tile(const Tile *t, int rows, int vectors, int by_k) {
    Sums sums;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = (vf){0};
    int64_t row_step = by_k ? 1 : t->a_step, k_step = by_k ? t->a_step : 1;
    const float *a = t->a, *b = t->b;
    for (int64_t left = t->terms, until = t->until; left > 0; until = PANEL) {
        int64_t terms = left < until ? left : until;
        a = sum_terms(sums, a, row_step, k_step, t->ahead, b, terms, rows, vectors);
        a += t->jump;
        b += terms * PANEL;
        left -= terms;
    }
    const float *other = t->sums;
    for (int64_t m = t->merges; m > 0; m--, other -= TILE_SIZE)
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                sums[r][v] = load(other + r * PANEL + v * VW) + sums[r][v];
    store_sums(sums, t, rows, vectors);
}

/* One function for each shape of a tile. */
typedef void (*FillTile)(const Tile *);
#define SHAPE(rows, vectors)                                                     \
    static void by_row_##rows##x##vectors(const Tile *t) {                       \
        fill_tile(t, rows, vectors, 0);                                          \
    }                                                                            \
    static void by_k_##rows##x##vectors(const Tile *t) {                         \
        fill_tile(t, rows, vectors, 1);                                          \
    }
#define NAME_BY_ROW(rows, vectors) by_row_##rows##x##vectors,
#define NAME_BY_K(rows, vectors) by_k_##rows##x##vectors,
#if TILE_ROWS == 12
#define EACH_ROWS(X, v) X(1, v) X(2, v) X(3, v) X(4, v) X(5, v) X(6, v) X(7, v) \
    X(8, v) X(9, v) X(10, v) X(11, v) X(12, v)
#elif TILE_ROWS == 6
#define EACH_ROWS(X, v) X(1, v) X(2, v) X(3, v) X(4, v) X(5, v) X(6, v)
#else
#define EACH_ROWS(X, v) X(1, v) X(2, v)
#endif
#if TILE_VECTORS == 4
#define EACH_VECTORS(X, list) list(X, 1) list(X, 2) list(X, 3) list(X, 4)
#elif TILE_VECTORS == 2
#define EACH_VECTORS(X, list) list(X, 1) list(X, 2)
#else
#define EACH_VECTORS(X, list) list(X, 1)
#endif
#define LIST_PLAIN(X, v) EACH_ROWS(X, v)
#define LIST_BRACED(X, v) {EACH_ROWS(X, v)},

EACH_VECTORS(SHAPE, LIST_PLAIN)
static const FillTile by_row[TILE_VECTORS][TILE_ROWS] = {
    EACH_VECTORS(NAME_BY_ROW, LIST_BRACED)};
static const FillTile by_k[TILE_VECTORS][TILE_ROWS] = {
    EACH_VECTORS(NAME_BY_K, LIST_BRACED)};
