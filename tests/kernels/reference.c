/* The products of docs/arithmetic.md as the page says it, one element at a time, on
 * row-major arrays. Compiled by the tests with -O1 -ffp-contract=off. */
#include <math.h>
#include <stdint.h>

/* Sum over k of a[k * a_step] * b[k * b_step]. */
static float product(const float *a, int64_t a_step, const float *b, int64_t b_step,
                     int64_t n) {
    float total = 0;
    for (int64_t k = 0; k < n; k += 256) {
        float s = 0;
        for (int64_t j = k; j < n && j < k + 256; j++)
            s = fmaf(a[j * a_step], b[j * b_step], s);
        total = k == 0 ? s : total + s;
    }
    return total;
}

/* y [samples, out] from x [samples, in], w [out, in] and bias [out] or NULL. */
void linear(const float *x, const float *w, const float *bias, float *y,
            int64_t samples, int64_t in, int64_t out, int32_t is_relu) {
    for (int64_t s = 0; s < samples; s++)
        for (int64_t o = 0; o < out; o++) {
            float v = product(w + o * in, 1, x + s * in, 1, in);
            if (bias) v = v + bias[o];
            y[s * out + o] = is_relu && v <= 0 ? 0 : v;
        }
}

/* dx [samples, in] from dy [samples, out] and w; gate [samples, in] or NULL. */
void grad_input(const float *dy, const float *w, const float *gate, float factor,
                float *dx, int64_t samples, int64_t in, int64_t out) {
    for (int64_t s = 0; s < samples; s++)
        for (int64_t i = 0; i < in; i++) {
            float v = product(w + i, in, dy + s * out, 1, out);
            if (gate) v = gate[s * in + i] <= 0 ? 0 : v * factor;
            dx[s * in + i] = v;
        }
}

/* dw [out, in] of one micro-batch. */
void grad_weight(const float *dy, const float *x, float *dw, int64_t samples,
                 int64_t in, int64_t out) {
    for (int64_t o = 0; o < out; o++)
        for (int64_t i = 0; i < in; i++)
            dw[o * in + i] = product(dy + o, out, x + i, in, samples);
}

/* db [out] of one micro-batch. */
void grad_bias(const float *dy, float *db, int64_t samples, int64_t out) {
    for (int64_t o = 0; o < out; o++) {
        db[o] = 0;
        for (int64_t first = 0; first < samples; first += 256) {
            float lane[16] = {0};
            for (int64_t s = first; s < samples && s < first + 256; s++)
                lane[s % 16] = lane[s % 16] + dy[s * out + o];
            for (int64_t half = 8; half > 0; half /= 2)
                for (int64_t l = 0; l < half; l++) lane[l] = lane[l] + lane[l + half];
            db[o] = db[o] + lane[0];
        }
    }
}

/* z[n] = fma(a[n], b[n], c[n]), rounded once. */
void fused(const float *a, const float *b, const float *c, float *z, int64_t n) {
    for (int64_t i = 0; i < n; i++) z[i] = fmaf(a[i], b[i], c[i]);
}
