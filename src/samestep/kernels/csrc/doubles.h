/* Vectors of doubles: `vd` holds half as many numbers as `vf`, `vl` and `vul` as many
 * integers of 64 bits. A `vf` is widened to two of them, exactly, and the two are
 * rounded to one `vf`, once. There is no fma: v2 has none, and what is computed in
 * double is rounded to float in the end. */
#ifndef DOUBLES_H
#define DOUBLES_H

#include "vector.h"

#define DW (VW / 2)

typedef double vd __attribute__((vector_size(4 * VW)));
typedef int64_t vl __attribute__((vector_size(4 * VW)));
typedef uint64_t vul __attribute__((vector_size(4 * VW)));
typedef double vd_memory __attribute__((vector_size(4 * VW), aligned(8), may_alias));

INLINE void store_double(double *p, vd x) { *(vd_memory *)p = x; }
INLINE vd splat_double(double x) { return x - (vd){0}; }
INLINE vd select_double(vl mask, vd a, vd b) {
    return (vd)((mask & (vl)a) | (~mask & (vl)b));
}
INLINE vd abs_double(vd x) { return (vd)((vl)x & INT64_MAX); }
/* The magnitude of `x` with the sign of `sign`. */
INLINE vd with_sign(vd x, vd sign) {
    return (vd)(((vl)x & INT64_MAX) | ((vl)sign & INT64_MIN));
}
/* x cut to [low, high]; a NaN stays. */
INLINE vd clamp(vd x, double low, double high) {
    x = select_double(x < low, splat_double(low), x);
    return select_double(x > high, splat_double(high), x);
}

#if VW == 16
INLINE vd low_double(vf x) {
    return (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
}
INLINE vd high_double(vf x) {
    return (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
}
INLINE vf round_doubles(vd low, vd high) {
    __m512 half = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)low));
    return (vf)_mm512_insertf32x8(half, _mm512_cvtpd_ps((__m512d)high), 1);
}
INLINE int any_double(vl mask) { return _mm512_movepi64_mask((__m512i)mask) != 0; }
#elif VW == 8
INLINE vd low_double(vf x) {
    return (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
}
INLINE vd high_double(vf x) {
    return (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
}
INLINE vf round_doubles(vd low, vd high) {
    __m256 half = _mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)low));
    return (vf)_mm256_insertf128_ps(half, _mm256_cvtpd_ps((__m256d)high), 1);
}
INLINE int any_double(vl mask) { return _mm256_movemask_pd((__m256d)mask) != 0; }
#elif defined(__aarch64__)
INLINE vd low_double(vf x) {
    return (vd)vcvt_f64_f32(vget_low_f32((float32x4_t)x));
}
INLINE vd high_double(vf x) { return (vd)vcvt_high_f64_f32((float32x4_t)x); }
INLINE vf round_doubles(vd low, vd high) {
    return (vf)vcvt_high_f32_f64(vcvt_f32_f64((float64x2_t)low), (float64x2_t)high);
}
INLINE int any_double(vl mask) { return (mask[0] | mask[1]) != 0; }
#else
/* low_double and high_double are in vector_v2.h, for its fma. */
INLINE vf round_doubles(vd low, vd high) {
    return (vf)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)low), _mm_cvtpd_ps((__m128d)high));
}
INLINE int any_double(vl mask) { return _mm_movemask_pd((__m128d)mask) != 0; }
#endif

#endif
