/* Runs product.cu on the CPU. */
#include "on_host.h"

#include "product.cu"

enum { STACK = 1 << 16 };

static struct {
    const float *a, *b;
    float *c;
    const int *sizes;
} call;
static int are_running;

static void thread(void) {
    const int *s = call.sizes;
    product(call.a, call.b, call.c, s[0], s[1], s[2], s[3], s[4], s[5], s[6]);
    are_running--;
    for (;;) __syncthreads();
}

static void run_block(char *stacks) {
    for (int n = 0; n < THREADS; n++) {
        getcontext(&turns[n]);
        turns[n].uc_stack.ss_sp = stacks + (size_t)n * STACK;
        turns[n].uc_stack.ss_size = STACK;
        makecontext(&turns[n], thread, 0);
    }
    for (are_running = THREADS; are_running > 0;)
        for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)
            swapcontext(&scheduler, &turns[threadIdx.x]);
}

/* Sizes: rows, columns, terms, then the four steps, as `product` takes them. */
int product_on_host(const float *a, const float *b, float *c, const int *sizes) {
    char *stacks = malloc((size_t)THREADS * STACK);
    turns = malloc(sizeof(ucontext_t) * THREADS);
    if (stacks == NULL || turns == NULL) return 1;
    call.a = a, call.b = b, call.c = c, call.sizes = sizes;
    for (blockIdx.y = 0; blockIdx.y * SIDE < sizes[0]; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x * SIDE < sizes[1]; blockIdx.x++)
            run_block(stacks);
    free(turns), free(stacks);
    return 0;
}
