/* What a core can do at most: fused multiply-adds in registers, and a copy. Compiled with
 * the flags of an instruction set, and the kernels' own vector.h. */
#include "vector.h"

#define CHAINS 12 /* independent, so that none waits for its own result */

/* `steps` times CHAINS vectors of fma. Returns the operations (two for each fma). */
double fma_loop(int64_t steps) {
    vf sums[CHAINS], factor = splat(0.5f), term = splat(1);
    for (int n = 0; n < CHAINS; n++) sums[n] = splat((float)n);
    for (int64_t i = 0; i < steps; i++) {
        sums[0] = fma_(sums[0], factor, term), sums[1] = fma_(sums[1], factor, term);
        sums[2] = fma_(sums[2], factor, term), sums[3] = fma_(sums[3], factor, term);
        sums[4] = fma_(sums[4], factor, term), sums[5] = fma_(sums[5], factor, term);
        sums[6] = fma_(sums[6], factor, term), sums[7] = fma_(sums[7], factor, term);
        sums[8] = fma_(sums[8], factor, term), sums[9] = fma_(sums[9], factor, term);
        sums[10] = fma_(sums[10], factor, term), sums[11] = fma_(sums[11], factor, term);
    }
    vf all = {0};
    for (int n = 0; n < CHAINS; n++) all += sums[n];
    return all[0] > 1e30f ? 0 : 2.0 * CHAINS * VW * (double)steps;
}

void copy(float *to, const float *from, int64_t size) {
    for (int64_t i = 0; i + VW <= size; i += VW) store(to + i, load(from + i));
}
