/* AVX2 and FMA: what vector.h declares. */
INLINE __m256i first_lanes(int64_t n) { return (__m256i)(iota() < (int32_t)n); }
INLINE vf load_part(const float *p, int64_t n) {
    return (vf)_mm256_maskload_ps(p, first_lanes(n));
}
INLINE void store_part(float *p, vf x, int64_t n) {
    _mm256_maskstore_ps(p, first_lanes(n), (__m256)x);
}
INLINE vf fma_(vf a, vf b, vf c) {
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE vf sqrt_(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
INLINE vf zip_low(vf a, vf b) {
    __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b);
    __m256 high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    return (vf)_mm256_permute2f128_ps(low, high, 0x20);
}
INLINE vf zip_high(vf a, vf b) {
    __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b);
    __m256 high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    return (vf)_mm256_permute2f128_ps(low, high, 0x31);
}
INLINE vq mul_even(vu a, vu b) {
    return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
