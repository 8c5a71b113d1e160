/* AVX-512: what vector.h declares. */
INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }
INLINE vf load_part(const float *p, int64_t n) {
    return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
INLINE void store_part(float *p, vf x, int64_t n) {
    _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x);
}
INLINE vf fma_(vf a, vf b, vf c) {
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE vf sqrt_(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
INLINE vf zip_low(vf a, vf b) {
    const __m512i lanes =
        _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return (vf)_mm512_permutex2var_ps((__m512)a, lanes, (__m512)b);
}
INLINE vf zip_high(vf a, vf b) {
    const __m512i lanes =
        _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return (vf)_mm512_permutex2var_ps((__m512)a, lanes, (__m512)b);
}
INLINE vq mul_even(vu a, vu b) {
    return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
