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
#define LINE 16 /* floats of a line of the cache */
#define TILE_SIZE (TILE_ROWS * TILE_COLUMNS)

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* One chain of a weight's gradient, and what becomes of its sum: the `merges` sums on
 * top of the stack are added, the last one first, and the sum takes their place. */
typedef struct {
    int64_t distance;         /* of its samples, from where the tile's begin */
    int64_t position, sample; /* of its first term; then to `end`, and from `first` */
    int64_t first, end;       /* again at the next position */
    int64_t terms;            /* how many k */
    int64_t merges;
    int64_t size; /* of the stack before it */
} Chain;

/* From one packed row of a weight's gradient to the next: other sets of the cache, and
 * room for a vector behind. */
#define PACKED_ROW (K_BLOCK + LINE)

/* c[r, 0..columns-1] = chain over k of a[r, k] b[k, :]. */
typedef struct {
    const float *a;
    int64_t a_step; /* from one row to the next, or from one k to the next */
    const float *b; /* from one k to the next: PANEL */
    const float *ahead; /* what to prefetch with every k */
    int64_t ahead_step;
    int64_t terms;   /* of a product: how many k */
    int is_addition; /* of a product: to what is in c */
    const Chain *chains; /* of a weight's gradient */
    const Chain *end;
    const Chain *last; /* its sum goes to c, others to the stack */
    int64_t jump;      /* of `a`, from one panel to the next */
    float *stack;      /* of tiles */
    float *c;
    int64_t c_step, columns;
} Tile;

typedef vf Sums[TILE_ROWS][TILE_VECTORS];

INLINE void clear_sums(Sums sums, int rows, int vectors) {
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = (vf){0};
}

/* sums = c + sums */
INLINE void add_sums(Sums sums, const float *c, int64_t step, int rows, int vectors) {
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[r][v] = load(c + r * step + v * VW) + sums[r][v];
}

/* `row_step` is 1 where `a` lies by k. */
INLINE void sum_terms(Sums sums, const float *a, int64_t row_step, int64_t k_step,
                      const float *b, int64_t b_step, int64_t terms, const float *ahead,
                      int64_t ahead_step, int rows, int vectors) {
    /* Rows in threes: an address may add once or twice a step, not three times. */
    const float *a3[(TILE_ROWS + 2) / 3];
    UNROLL for (int r = 0; r < rows; r += 3) a3[r / 3] = a + r * row_step;
    for (int64_t k = 0; k < terms; k++, b += b_step) {
        vf row[TILE_VECTORS];
        /* What follows in `a` may be no stream that a processor foresees; by row, b may
         * come from the second cache: the lines of the tile. */
        __builtin_prefetch(ahead);
        ahead += ahead_step;
        if (row_step != 1 && b_step == PANEL) {
            __builtin_prefetch(b + 12 * PANEL);
            if (TILE_COLUMNS > LINE) __builtin_prefetch(b + 12 * PANEL + LINE);
        }
        UNROLL for (int v = 0; v < vectors; v++) row[v] = load(b + v * VW);
        UNROLL for (int r = 0; r < rows; r++) {
            vf x = splat(a3[r / 3][r % 3 * row_step]);
            UNROLL for (int v = 0; v < vectors; v++)
                sums[r][v] = fma_(x, row[v], sums[r][v]);
        }
        UNROLL for (int r = 0; r < rows; r += 3) a3[r / 3] += k_step;
    }
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
    clear_sums(sums, rows, vectors);
    int64_t row_step = by_k ? 1 : t->a_step, k_step = by_k ? t->a_step : 1;
    sum_terms(sums, t->a, row_step, k_step, t->b, PANEL, t->terms, t->ahead,
              t->ahead_step, rows, vectors);
    if (t->is_addition) add_sums(sums, t->c, t->c_step, rows, vectors);
    store_sums(sums, t, rows, vectors);
}

INLINE void sum_chain(Sums sums, const Tile *t, const Chain *chain, int rows,
                      int vectors) {
    const float *a = t->a + chain->distance, *b = t->b + chain->distance;
    int64_t s = chain->sample, end = s + chain->terms;
    clear_sums(sums, rows, vectors);
    while (s < end) {
        int64_t k = s % PANEL, terms = PANEL - k;
        terms = end - s < terms ? end - s : terms;
        /* The lines of the tile in the next panel, one with each term of this one. */
        const float *panel = a + s / PANEL * t->jump, *ahead = panel + t->jump;
        sum_terms(sums, panel + k, PANEL, 1, b + s * PANEL, PANEL, terms,
                  ahead + k * LINE, LINE, rows, vectors);
        s += terms;
    }
}

/* All micro-batches of a tile in one function: the next one's terms begin while this
 * one's are added up the tree. */
INLINE void sum_chains(const Tile *t, int rows, int vectors, int is_packed) {
    const float *a = t->a, *b = t->b;
    for (const Chain *chain = t->chains; chain < t->end; chain++) {
        Sums sums;
        if (is_packed) {
            clear_sums(sums, rows, vectors);
            sum_terms(sums, a, PACKED_ROW, 1, b, TILE_COLUMNS, chain->terms, t->ahead,
                      t->ahead_step, rows, vectors);
            a += chain->terms;
            b += chain->terms * TILE_COLUMNS;
        } else {
            sum_chain(sums, t, chain, rows, vectors);
        }
        float *top = t->stack + chain->size * TILE_SIZE;
        for (int64_t m = chain->merges; m > 0; m--) {
            top -= TILE_SIZE;
            add_sums(sums, top, TILE_COLUMNS, rows, vectors);
        }
        if (chain == t->last) {
            store_sums(sums, t, rows, vectors);
            return;
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                store(top + r * TILE_COLUMNS + v * VW, sums[r][v]);
    }
}

/* One function for each shape of a tile. */
typedef void (*FillTile)(const Tile *);
#define SHAPE(rows, vectors)                                                     \
    static void by_row_##rows##x##vectors(const Tile *t) {                       \
        fill_tile(t, rows, vectors, 0);                                          \
    }                                                                            \
    static void by_k_##rows##x##vectors(const Tile *t) {                         \
        fill_tile(t, rows, vectors, 1);                                          \
    }                                                                            \
    static void chains_##rows##x##vectors(const Tile *t) {                       \
        sum_chains(t, rows, vectors, 0);                                         \
    }                                                                            \
    static void packed_##rows##x##vectors(const Tile *t) {                       \
        sum_chains(t, rows, vectors, 1);                                         \
    }
#define NAME_BY_ROW(rows, vectors) by_row_##rows##x##vectors,
#define NAME_BY_K(rows, vectors) by_k_##rows##x##vectors,
#define NAME_CHAINS(rows, vectors) chains_##rows##x##vectors,
#define NAME_PACKED(rows, vectors) packed_##rows##x##vectors,
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
static const FillTile by_chains[TILE_VECTORS][TILE_ROWS] = {
    EACH_VECTORS(NAME_CHAINS, LIST_BRACED)};
static const FillTile by_packed[TILE_VECTORS][TILE_ROWS] = {
    EACH_VECTORS(NAME_PACKED, LIST_BRACED)};
