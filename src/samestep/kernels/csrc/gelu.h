/* GELU and its derivative, in float with fma: a third of what they cost in double, and
 * closer to the exact values than torch's. The tail of the normal distribution is
 * Phi(-t) = 2^(-1 - t G(t)); its exponent is rounded off, the rest is E2. */
#ifndef GELU_H
#define GELU_H

#include "functions.h"

#define FUSED_POLYNOMIAL(x, c) fused_polynomial(x, c, (int)(sizeof(c) / sizeof(c[0])))
INLINE vf fused_polynomial(vf x, const float *c, int size) {
    vf sum = splat(c[size - 1]);
    for (int i = size - 2; i >= 0; i--) sum = fma_(sum, x, splat(c[i]));
    return sum;
}

/* 2^x for -126 <= x <= 1. */
INLINE vf exp2_(vf x) {
    static const float E2[] = {0x1p0f,         0x1.62e43p-1f,  0x1.ebfbep-3f,
                               0x1.c6aeccp-5f, 0x1.3b29d8p-7f, 0x1.5f48c8p-10f,
                               0x1.446c7ep-13f};
    vf shifted = x + 0x1.8p23f, r = x - (shifted - 0x1.8p23f);
    vf power = (vf)((vu)((vi)shifted + 127) << 23);
    return FUSED_POLYNOMIAL(r, E2) * power;
}

INLINE vf smaller_magnitude(vf x, float limit) {
    vf t = abs_(x);
    return select_(t > limit, splat(limit), t);
}

/* The normal distribution function. */
INLINE vf normal_(vf x) {
    static const float G[] = {0x1.26aecep+0f,   0x1.d63c5cp-2f,   0x1.adc442p-5f,
                              -0x1.c95fa6p-8f,  0x1.cc4886p-16f,  0x1.16e2a2p-12f,
                              -0x1.2f8df4p-14f, 0x1.580f68p-17f,  -0x1.a901e4p-21f,
                              0x1.c2387ep-26f};
    vf t = smaller_magnitude(x, 5.7f);
    vf tail = exp2_(fma_(-t, FUSED_POLYNOMIAL(t, G), splat(-1)));
    tail = keep(~(abs_(x) > 5.7f), tail);
    return select_(x < 0, tail, 1 - tail);
}
INLINE vf gelu_(vf x) { return x * normal_(x); }
INLINE vf gelu_slope_of(vf x, vf normal) {
    vf t = smaller_magnitude(x, 13);
    vf density =
        exp2_(fma_(t * t, splat(-0x1.715476p-1f), splat(-0x1.53643ap+0f)));
    return fma_(x, keep(~(abs_(x) > 13), density), normal);
}
INLINE vf gelu_slope(vf x) { return gelu_slope_of(x, normal_(x)); }

/* The approximation by tanh: x (1 + tanh(k (x + 0.044715 x^3))) / 2, k^2 = 2 / pi. */
INLINE vf gelu_tanh_part(vf x) {
    return tanh_(x * fma_(x * x, splat(0x1.2444f2p-5f), splat(0x1.988454p-1f)));
}
INLINE vf gelu_tanh(vf x) { return (0.5f * x) * (1 + gelu_tanh_part(x)); }
INLINE vf gelu_tanh_slope(vf x) {
    vf y = gelu_tanh_part(x);
    vf slope = fma_(x * x, splat(0x1.b6676cp-4f), splat(0x1.988454p-1f));
    return fma_((0.5f * x) * (1 - y * y), slope, 0.5f * (1 + y));
}

INLINE vf silu_(vf x) { return x * sigmoid_(x); }
INLINE vf silu_slope(vf x) {
    vf y = sigmoid_(x);
    return y * fma_(x, 1 - y, splat(1));
}

#endif
