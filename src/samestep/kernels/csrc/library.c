/* The exported symbols: what the library is, and the choice of the kernels. This file
 * is compiled for any processor of the architecture: it runs before the choice. */
#include "samestep.h"

#include <stddef.h>
#include <string.h>

/* compiling.py defines SOURCES, the digest of the sources, and COMPILED_IN. */

#if defined(__x86_64__)
#include <cpuid.h>

/* The four registers of CPUID's answer, 0 for a leaf that the processor lacks. */
typedef struct {
    unsigned a, b, c, d;
} Registers;

static Registers ask(unsigned leaf) {
    Registers r = {0, 0, 0, 0};
    if (!__get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d)) memset(&r, 0, sizeof r);
    return r;
}

static int all(unsigned value, unsigned bits) { return (value & bits) == bits; }

/* The states that the operating system saves (XCR0): AVX needs its support, too. */
static unsigned saved_states(void) {
    if (!all(ask(1).c, bit_OSXSAVE)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* A library for tests may lack the kernels that ask for one of these. */
#define MAYBE __attribute__((unused))

MAYBE static int has_v2(void) {
    return all(ask(1).c, bit_SSE3 | bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT);
}

MAYBE static int has_v3(void) {
    const unsigned ymm = 0x06;
    return has_v2() && all(saved_states(), ymm) &&
           all(ask(1).c, bit_AVX | bit_FMA | bit_F16C | bit_MOVBE) &&
           all(ask(7).b, bit_AVX2 | bit_BMI | bit_BMI2) &&
           all(ask(0x80000001).c, 1u << 5 /* LZCNT */);
}

MAYBE static int has_v4(void) {
    const unsigned zmm = 0xe6;
    const unsigned f = 1u << 16, dq = 1u << 17, cd = 1u << 28, bw = 1u << 30;
    const unsigned vl = 1u << 31;
    return has_v3() && all(saved_states(), zmm) && all(ask(7).b, f | dq | cd | bw | vl);
}

#elif defined(__aarch64__)

/* Every aarch64 processor has NEON and fma. */
static int has_neon(void) { return 1; }

#else
#error "there are kernels for x86-64 and aarch64 only"
#endif

typedef struct {
    const Kernels *kernels;
    int (*is_supported)(void);
} Choice;

/* WITH(isa) for each instruction set that is compiled in, the best first. */
#define WITH(isa) extern const Kernels samestep_##isa;
COMPILED_IN
#undef WITH
#define WITH(isa) {&samestep_##isa, has_##isa},
static const Choice choices[] = {COMPILED_IN{NULL, NULL}};
#undef WITH
#define WITH(isa) #isa,
static const char *const names[] = {COMPILED_IN NULL};

int32_t samestep_specification(void) { return SAMESTEP_SPECIFICATION; }

int32_t samestep_interface(void) { return SAMESTEP_INTERFACE; }

const char *samestep_sources(void) { return SOURCES; }

const char *const *samestep_isas(void) { return names; }

const Kernels *samestep_kernels(const char *isa) {
    for (size_t n = 0; choices[n].kernels; n++) {
        if (isa && strcmp(isa, names[n]) != 0) continue;
        if (choices[n].is_supported()) return choices[n].kernels;
        if (isa) return NULL;
    }
    return NULL;
}
