/* Vectors of one instruction set: `vf` holds VW floats, `vi` and `vu` as many integers.
 * + - * / and comparisons are the compiler's (GNU vector extensions; a comparison gives
 * 0 or -1 in every lane); what they lack is here. Every operation rounds once, as IEEE
 * 754 says, so that all instruction sets give equal bits. */
#ifndef VECTOR_H
#define VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>
#define VW 4
#else
#include <immintrin.h>
#if defined(__AVX512F__)
#define VW 16
#elif defined(__AVX2__) && defined(__FMA__)
#define VW 8
#else
#define VW 4
#endif
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef uint32_t vu __attribute__((vector_size(4 * VW)));
typedef uint64_t vq __attribute__((vector_size(4 * VW)));
typedef float vf_memory __attribute__((vector_size(4 * VW), aligned(4), may_alias));
typedef int32_t vi_memory __attribute__((vector_size(4 * VW), aligned(4), may_alias));
typedef uint32_t vu_memory __attribute__((vector_size(4 * VW), aligned(4), may_alias));

INLINE vf load(const float *p) { return *(const vf_memory *)p; }
INLINE void store(float *p, vf x) { *(vf_memory *)p = x; }
INLINE vi load_int(const int32_t *p) { return *(const vi_memory *)p; }
INLINE vu load_words(const uint32_t *p) { return *(const vu_memory *)p; }

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splat_int(int32_t x) { return x - (vi){0}; }

/* 0, 1, 2, ... */
INLINE vi iota(void) {
    static const int32_t lanes[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                      8, 9, 10, 11, 12, 13, 14, 15};
    return load_int(lanes);
}

/* Lanes of `a` where the mask is -1, of `b` where it is 0. */
INLINE vf select_(vi mask, vf a, vf b) {
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}
/* `x` where the mask is -1, +0 where it is 0. */
INLINE vf keep(vi mask, vf x) { return (vf)(mask & (vi)x); }
INLINE vf abs_(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }
/* x <= 0 ? +0 : x, and a NaN stays. */
INLINE vf relu(vf x) { return (vf)(~(x <= 0) & (vi)x); }

INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

/* The first n lanes (0 <= n <= VW); load_part gives +0 in the others. */
INLINE vf load_part(const float *p, int64_t n);
INLINE void store_part(float *p, vf x, int64_t n);
/* a b + c, rounded once. */
INLINE vf fma_(vf a, vf b, vf c);
INLINE vf sqrt_(vf x);
/* Lanes of a and b in turn: a0 b0 a1 b1 ..., from the lower and the upper halves. */
INLINE vf zip_low(vf a, vf b);
INLINE vf zip_high(vf a, vf b);
/* The products of lanes 0, 2, 4, ..., exact. */
INLINE vq mul_even(vu a, vu b);
/* The mode of floating point: callers may flush subnormals to zero. */
typedef uint64_t Mode;
INLINE Mode enter_default_mode(void);
INLINE void leave_default_mode(Mode before);

#if VW == 16
#include "vector_v4.h"
#elif VW == 8
#include "vector_v3.h"
#elif defined(__aarch64__)
#include "vector_neon.h"
#else
#include "vector_v2.h"
#endif

#if defined(__aarch64__)
INLINE Mode enter_default_mode(void) {
    Mode before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before)::"memory");
    __asm__ volatile("msr fpcr, %0" ::"r"((Mode)0) : "memory");
    return before;
}
INLINE void leave_default_mode(Mode before) {
    __asm__ volatile("msr fpcr, %0" ::"r"(before) : "memory");
}
#else
INLINE Mode enter_default_mode(void) {
    Mode before = _mm_getcsr();
    _mm_setcsr(0x1F80);
    return before;
}
/* Flags that the kernels raised are dropped: they mean nothing to the caller. */
INLINE void leave_default_mode(Mode before) { _mm_setcsr((unsigned)before); }
#endif

#endif
