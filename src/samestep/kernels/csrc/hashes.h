/* Hashes of vectors that are sums over their words, modulo 2^64, so that each worker adds
 * what it updates, in any pieces:
 *
 *     sum over words w of  w * keys[place % HASH_BLOCK] * factor(place / HASH_BLOCK)
 *
 * A word is the 32 bits of a float. Multilinear hashing (Carter and Wegman 1979, section
 * 3; Halevi and Krawczyk 1997, MMH) with a second level of odd factors. */

INLINE uint64_t mix_words(uint64_t x) { /* the last step of SplitMix64 */
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}
INLINE uint64_t factor_of(int64_t block) {
    return mix_words((uint64_t)(block + 1) * 0x9E3779B97F4A7C15) | 1;
}

INLINE vu upper(vu words) { return (vu)((vq)words >> 32); }
INLINE vq times_keys(vu words, const uint32_t *keys) {
    vu even = load_words(keys);
    return mul_even(words, even) + mul_even(upper(words), upper(even));
}
/* The words of a vector as they are; of a gradient, zeros as positive ones: PyTorch gives
 * them one sign or the other, by the way in which it computes a product. */
INLINE vu words_of(vf values, int is_gradient) {
    return (vu)(is_gradient ? values + 0.0f : values);
}
/* Of n words of the sum of two vectors, all in one block; `keys` from their place on. */
INLINE uint64_t hash_words(Halves sum, int is_gradient, const uint32_t *keys,
                           int64_t n) {
    vq total = {0};
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        total += times_keys(words_of(root_of(sum, i), is_gradient), keys + i);
    if (i < n)
        total += times_keys(words_of(root_part(sum, i, n - i), is_gradient), keys + i);
    uint64_t all = 0;
    for (int lane = 0; lane < VW / 2; lane++) all += total[lane];
    return all;
}

INLINE Halves from(Halves sum, int64_t i) {
    return (Halves){sum.a + i, sum.b ? sum.b + i : NULL};
}
INLINE uint64_t hash_sum(const uint32_t *keys, Halves sum, int is_gradient,
                         int64_t first, int64_t n) {
    uint64_t all = 0;
    for (int64_t i = 0, count; i < n; i += count) {
        int64_t place = (first + i) % HASH_BLOCK;
        count = smaller(HASH_BLOCK - place, n - i);
        all += factor_of((first + i) / HASH_BLOCK) *
               hash_words(from(sum, i), is_gradient, keys + place, count);
    }
    return all;
}
static uint64_t hash_gradient(const uint32_t *keys, Halves sum, int64_t first,
                              int64_t n) {
    return hash_sum(keys, sum, 1, first, n);
}
static uint64_t hash_vector(const uint32_t *keys, const float *words, int64_t first,
                            int64_t n) {
    return hash_sum(keys, (Halves){words, NULL}, 0, first, n);
}
