/* Makes a program for the CPU of a CUDA kernel: enough of CUDA for product.cu.
 *
 * The threads of a block are coroutines on stacks of their own, which take turns at every
 * __syncthreads; blocks run one after the other, so what they share may be static. */
#define _XOPEN_SOURCE 700
#include <math.h>
#include <stdlib.h>
#include <ucontext.h>

#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define KERNEL static
#define __syncthreads() (void)swapcontext(&turns[threadIdx.x], &scheduler)

typedef struct {
    float x, y, z, w;
} float4;
typedef struct {
    int x, y, z;
} Index;

static Index threadIdx, blockIdx;
static ucontext_t scheduler, *turns;
