/* Functions of one float, computed in double out of + - * / only and rounded to float
 * once: so the error is at most 0.51 units in the last place (rsqrt, in float: 1.5).
 * docs/arithmetic.md has the formulas, with the same names; `make arithmetic` tests all
 * 2^32 inputs. The coefficients interpolate at Chebyshev nodes, or are weighted least
 * squares (erf), with a relative error of the result of 2^-31.8 to 2^-36. */
#ifndef FUNCTIONS_H
#define FUNCTIONS_H

#include "doubles.h"

/* A polynomial by Horner's rule, c[0] + x (c[1] + x (c[2] + ...)). */
#define POLYNOMIAL(x, c) polynomial(x, c, (int)(sizeof(c) / sizeof(c[0])))
INLINE vd polynomial(vd x, const double *c, int size) {
    vd sum = splat_double(c[size - 1]);
    for (int i = size - 2; i >= 0; i--) sum = sum * x + c[i];
    return sum;
}

/* Added and subtracted again, it rounds to an integer. The sum's low bits are that
 * integer, modulo 2^51. */
#define ROUND 0x1.8p52

/* e^x = 2^n (1 + r E(r)), |r| <= log(2) / 2, for |x| <= 128: returns r E(r) and sets
 * `power` to 2^n. A NaN gives a NaN and an arbitrary power. */
INLINE vd exp_parts(vd x, vd *power) {
    static const double E[] = {
        0x1p0, 0x1.000000288b44fp-1, 0x1.555555675861fp-3, 0x1.5554acaf47b8cp-5,
        0x1.1110c6242ab95p-7, 0x1.6d7565c858406p-10, 0x1.a15197f39bb88p-13};
    vd shifted = x * 0x1.71547652b82fep+0 + ROUND;
    vd r = x - (shifted - ROUND) * 0x1.62e42fefa39efp-1;
    *power = (vd)(((vul)shifted + 1023) << 52);
    return r * POLYNOMIAL(r, E);
}
INLINE vd exp_double(vd x) {
    vd power, rest = exp_parts(clamp(x, -110, 90), &power);
    return (rest + 1) * power;
}
/* e^x - 1, for |x| <= 128. */
INLINE vd expm1_double(vd x) {
    vd power, rest = exp_parts(x, &power);
    return rest * power + (power - 1);
}

/* x = 2^k m with m in [sqrt(1/2), sqrt(2)); log(m) = s (2 + s^2 L(s^2)). */
INLINE vd log_double(vd x) {
    static const double L[] = {0x1.5555554b9093fp-1, 0x1.9999ec3729b4fp-2,
                               0x1.245be339569aep-2, 0x1.dde346532ee16p-3};
    vul bits = (vul)x;
    vul k = (bits - (0x3FE6A09E667F3BCDu - (1023ull << 52))) >> 52; /* k + 1023 */
    vd m = (vd)(bits - ((k - 1023) << 52));
    vd s = (m - 1) / (m + 1), z = s * s;
    vd exponent = (vd)(k | 0x4330000000000000u) - 0x1.00000000003ffp52;
    vd y = exponent * 0x1.62e42fefa39efp-1 + s * (z * POLYNOMIAL(z, L) + 2);
    y = select_double(x == __builtin_inf(), x, y);
    y = select_double(x == 0, splat_double(-__builtin_inf()), y);
    return select_double(x >= 0, y, splat_double(__builtin_nan("")));
}

/* log(1 + x); small ones by two terms of the series. */
INLINE vd log1p_double(vd x) {
    vl is_small = abs_double(x) < 0x1p-20;
    return select_double(is_small, x - x * x * 0.5, log_double(x + 1));
}

INLINE vd tanh_double(vd x) {
    vd e = expm1_double(clamp(abs_double(x), 0, 10) * 2);
    return with_sign(e / (e + 2), x);
}
INLINE vd sigmoid_double(vd x) {
    vd power, rest = exp_parts(clamp(-x, -110, 110), &power);
    return 1 / ((rest + 1) * power + 1);
}
/* erf(x) = 1 - e^(-x F(x)) for 0 <= x <= 3.95; beyond 3.92 it is 1 as a float. */
INLINE vd erf_double(vd x) {
    static const double F[] = {
        0x1.20dd7503b0dccp+0, 0x1.45f3076a5cd55p-1, 0x1.a4f477a1aa1f4p-4,
        -0x1.39571a81db2e9p-6, -0x1.da9babaa2b633p-13, 0x1.c8b7ed6978843p-10,
        -0x1.5db10c3b8bd2fp-11, 0x1.c5c134ad99c10p-14, 0x1.1ab255b8447c0p-17,
        -0x1.06f3ad99fd0c0p-17, 0x1.940ce0207b849p-20, -0x1.c4c08194c610ap-24};
    vd t = clamp(abs_double(x), 0, 3.95);
    return with_sign(expm1_double(-(t * POLYNOMIAL(t, F))), x);
}

/* 2 / pi, in binary digits after the point. */
static const uint64_t two_over_pi[5] = {0xa2f9836e4e441529, 0xfc2757d1f534ddc0,
                                        0xdb6295993c439041, 0xfe5163abdebbc561,
                                        0xb7246e3a424dd2e0};
/* 64 binary digits of 2 / pi, beginning with that of 2^-first. */
INLINE uint64_t digits(int64_t first) {
    int64_t word = (first - 1) / 64, shift = (first - 1) % 64;
    uint64_t high = two_over_pi[word] << shift;
    return shift ? high | two_over_pi[word + 1] >> (64 - shift) : high;
}
/* x = n pi / 2 + r for a float |x| >= 2^20, with 126 binary places of x (2 / pi). */
static double reduce_large(double x, int64_t *n) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    int64_t exponent = (int64_t)(bits >> 52 & 0x7FF) - 1023 - 23; /* x = m 2^exponent */
    if (exponent > 104) return x - x;
    uint64_t m = (bits >> 29 & 0x7FFFFF) | 0x800000;
    /* Digits above that of 2^(2 - exponent) add multiples of 4 to x (2 / pi). */
    unsigned __int128 window = exponent > 2
        ? (unsigned __int128)digits(exponent - 1) << 64 | digits(exponent + 63)
        : ((unsigned __int128)digits(1) << 64 | digits(65)) >> (2 - exponent);
    unsigned __int128 turns = window * m; /* modulo 4, with 126 binary places */
    *n = (int64_t)((turns + ((unsigned __int128)1 << 125)) >> 126);
    turns -= (unsigned __int128)*n << 126;
    double part = (double)(int64_t)(turns >> 64) * 0x1p-62
        + (double)(int64_t)((uint64_t)turns >> 11) * 0x1p-115;
    double r = part * 0x1.921fb54442d18p+0;
    if (bits >> 63) *n = -*n, r = -r;
    return r;
}
/* x = n pi / 2 + r, |r| <= pi / 4. Below 2^20, n times the first part of pi / 2 is
 * exact; above, which is rare, lanes are computed one by one. */
INLINE vl quadrant(vd x, vd *r) {
    vd shifted = x * 0x1.45f306dc9c883p-1 + ROUND, n = shifted - ROUND;
    vl quadrants = (vl)shifted, is_small = abs_double(x) < 0x1p20;
    *r = (x - n * 0x1.921fb544p0) - n * 0x1.0b4611a626331p-34;
    if (any_double(~is_small))
        for (int lane = 0; lane < DW; lane++)
            if (!is_small[lane]) {
                int64_t turned = 0;
                (*r)[lane] = reduce_large(x[lane], &turned);
                quadrants[lane] = turned;
            }
    return quadrants;
}
/* The sine of r + n pi / 2. */
INLINE vd turned_sine(vd r, vl n) {
    static const double S[] = {-0x1.555555545dca6p-3, 0x1.11110dee91a4fp-7,
                               -0x1.a013a6c06f5e8p-13, 0x1.6dbdc3bcca7f5p-19};
    static const double C[] = {-0x1.fffffffab078ep-2, 0x1.55554cb996961p-5,
                               -0x1.6c0e075d62620p-10, 0x1.9a6ecdb583f44p-16};
    vd z = r * r;
    vd sine = r * (z * POLYNOMIAL(z, S) + 1), cosine = z * POLYNOMIAL(z, C) + 1;
    vd y = select_double(-(n & 1), cosine, sine);
    return (vd)((vl)y ^ (vl)((vul)(n & 2) << 62));
}
INLINE vd sin_double(vd x) {
    vd r;
    vl n = quadrant(x, &r);
    return turned_sine(r, n);
}
INLINE vd cos_double(vd x) {
    vd r;
    vl n = quadrant(x, &r);
    return turned_sine(r, n + 1);
}

#define OF_FLOATS(name)                                                         \
    INLINE vf name##_(vf x) {                                                   \
        return round_doubles(name##_double(low_double(x)),                      \
                             name##_double(high_double(x)));                    \
    }
OF_FLOATS(log1p)
INLINE vd expm1_in_range(vd x) { return expm1_double(clamp(x, -110, 110)); }
INLINE vf expm1_(vf x) {
    return round_doubles(expm1_in_range(low_double(x)), expm1_in_range(high_double(x)));
}
OF_FLOATS(exp)
OF_FLOATS(log)
OF_FLOATS(tanh)
OF_FLOATS(sigmoid)
OF_FLOATS(erf)
OF_FLOATS(sin)
OF_FLOATS(cos)
INLINE vf rsqrt_(vf x) { return 1 / sqrt_(x); }

/* The numbers of Kernels.function. */
enum { EXP, LOG, TANH, SIGMOID, ERF, SIN, COS, RSQRT };

#define ON_ARRAY(name)                                                          \
    static void name##_array(const float *x, float *y, int64_t size) {          \
        int64_t i = 0;                                                          \
        for (; i + VW <= size; i += VW) store(y + i, name##_(load(x + i)));     \
        int64_t n = size - i;                                                   \
        if (n > 0) store_part(y + i, name##_(load_part(x + i, n)), n);          \
    }
ON_ARRAY(exp)
ON_ARRAY(log)
ON_ARRAY(tanh)
ON_ARRAY(sigmoid)
ON_ARRAY(erf)
ON_ARRAY(sin)
ON_ARRAY(cos)
ON_ARRAY(rsqrt)

static int function(int32_t number, const float *x, float *y, int64_t size) {
    static void (*const arrays[])(const float *, float *, int64_t) = {
        exp_array, log_array, tanh_array, sigmoid_array,
        erf_array, sin_array, cos_array,  rsqrt_array};
    if (number < 0 || number > RSQRT) return -1;
    arrays[number](x, y, size);
    return 0;
}

#endif
