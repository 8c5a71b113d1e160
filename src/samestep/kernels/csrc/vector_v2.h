/* x86-64-v2 (SSE4.2, without fma): what vector.h declares. Slow, and right. */
INLINE vf load_part(const float *p, int64_t n) {
    float lanes[VW] = {0};
    for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
    return load(lanes);
}
INLINE void store_part(float *p, vf x, int64_t n) {
    float lanes[VW];
    store(lanes, x);
    for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}

typedef double vd __attribute__((vector_size(16)));
typedef int64_t vl __attribute__((vector_size(16)));

/* a b + c for two lanes, in double and rounded to odd: rounding that to float is as
 * rounding the exact value, as 53 digits are at least 24 + 2. The product of two floats
 * is exact in double; `error` is exactly what the addition lost (TwoSum); where it
 * lost something and the last digit is even, the neighbour towards the exact value has
 * the odd one. Infinities and NaNs have a NaN as error, which neither test finds. */
INLINE vd fma_to_odd(vd a, vd b, vd c) {
    vd product = a * b, sum = product + c;
    vd part = sum - product;
    vd error = (product - (sum - part)) + (c - part);
    vl up = (error > 0) & (sum > 0), down = (error > 0) & (sum < 0);
    up |= (error < 0) & (sum < 0), down |= (error < 0) & (sum > 0);
    vl bits = (vl)sum, even = (bits & 1) - 1;
    return (vd)(bits + (even & (down - up)));
}
INLINE vd low_double(vf x) { return (vd)_mm_cvtps_pd((__m128)x); }
INLINE vd high_double(vf x) {
    return (vd)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x));
}
INLINE vf fma_(vf a, vf b, vf c) {
    vd low = fma_to_odd(low_double(a), low_double(b), low_double(c));
    vd high = fma_to_odd(high_double(a), high_double(b), high_double(c));
    return (vf)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)low), _mm_cvtpd_ps((__m128d)high));
}
INLINE vf sqrt_(vf x) { return (vf)_mm_sqrt_ps((__m128)x); }
INLINE vf zip_low(vf a, vf b) { return (vf)_mm_unpacklo_ps((__m128)a, (__m128)b); }
INLINE vf zip_high(vf a, vf b) { return (vf)_mm_unpackhi_ps((__m128)a, (__m128)b); }
INLINE vq mul_even(vu a, vu b) { return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b); }
