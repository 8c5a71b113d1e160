/* The functions of docs/arithmetic.md, as plainly as they can be written. */
#include <math.h>
#include <stdint.h>
#include <string.h>

static double polynomial(double x, const double *c, int size) {
    double sum = c[size - 1];
    for (int i = size - 2; i >= 0; i--) sum = sum * x + c[i];
    return sum;
}
/* The nearest integer, ties to even; never -0. */
static double rounded(double x) { return (x + 0x1.8p52) - 0x1.8p52; }
static double exp_part(double x, double *power) {
    static const double P[7] = {
        0x1p0, 0x1.000000288b44fp-1, 0x1.555555675861fp-3, 0x1.5554acaf47b8cp-5,
        0x1.1110c6242ab95p-7, 0x1.6d7565c858406p-10, 0x1.a15197f39bb88p-13};
    double n = rounded(x * 0x1.71547652b82fep+0);
    double r = x - n * 0x1.62e42fefa39efp-1;
    *power = isnan(n) ? n : ldexp(1, (int)n);
    return r * polynomial(r, P, 7);
}
static double cut(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
}
static double expm1_of(double x) {
    double power, rest = exp_part(x, &power);
    return rest * power + (power - 1);
}
static double exp_of(double x) {
    double power, rest = exp_part(cut(x, -110, 90), &power);
    return (rest + 1) * power;
}
static double log_of(double x) {
    static const double P[4] = {0x1.5555554b9093fp-1, 0x1.9999ec3729b4fp-2,
                                0x1.245be339569aep-2, 0x1.dde346532ee16p-3};
    if (!(x >= 0)) return NAN;
    if (x == 0) return -INFINITY;
    if (isinf(x)) return x;
    int k;
    double m = frexp(x, &k);
    if (m < 0x1.6a09e667f3bcdp-1) m *= 2, k--;
    double s = (m - 1) / (m + 1), z = s * s;
    return k * 0x1.62e42fefa39efp-1 + s * (z * polynomial(z, P, 4) + 2);
}
static double log1p_of(double x) {
    return fabs(x) < 0x1p-20 ? x - x * x * 0.5 : log_of(x + 1);
}
static double tanh_of(double x) {
    double e = expm1_of(cut(fabs(x), 0, 10) * 2);
    return copysign(e / (e + 2), x);
}
static double sigmoid_of(double x) {
    double power, rest = exp_part(cut(-x, -110, 110), &power);
    return 1 / ((rest + 1) * power + 1);
}
static double erf_of(double x) {
    static const double P[12] = {
        0x1.20dd7503b0dccp+0, 0x1.45f3076a5cd55p-1, 0x1.a4f477a1aa1f4p-4,
        -0x1.39571a81db2e9p-6, -0x1.da9babaa2b633p-13, 0x1.c8b7ed6978843p-10,
        -0x1.5db10c3b8bd2fp-11, 0x1.c5c134ad99c10p-14, 0x1.1ab255b8447c0p-17,
        -0x1.06f3ad99fd0c0p-17, 0x1.940ce0207b849p-20, -0x1.c4c08194c610ap-24};
    double t = cut(fabs(x), 0, 3.95);
    return copysign(expm1_of(-(t * polynomial(t, P, 12))), x);
}
static const char two_over_pi[] = /* hexadecimal digits after the point */
    "a2f9836e4e441529fc2757d1f534ddc0db6295993c439041fe5163abdebbc561b7246e3a424dd2e0";
/* Binary digit number i after the point; those before it are 0. */
static int digit(int64_t i) {
    if (i < 1) return 0;
    char c = two_over_pi[(i - 1) / 4];
    return (c <= '9' ? c - '0' : c - 'a' + 10) >> (3 - (i - 1) % 4) & 1;
}
/* x = n pi / 2 + r: the remainder r, and n modulo 4. */
static double remainder_of(double x, int *n) {
    if (fabs(x) < 0x1p20) {
        double turns = rounded(x * 0x1.45f306dc9c883p-1);
        *n = (int)(int64_t)turns & 3;
        return (x - turns * 0x1.921fb544p0) - turns * 0x1.0b4611a626331p-34;
    }
    *n = 0;
    if (isnan(x) || isinf(x)) return NAN;
    int exponent;
    uint64_t m = (uint64_t)(frexp(fabs(x), &exponent) * 0x1p24);
    exponent -= 24;
    unsigned __int128 window = 0; /* the digits of 2^1 to 2^-126 of 2^exponent 2 / pi */
    for (int64_t i = -1; i <= 126; i++)
        window = window << 1 | (unsigned)digit(i + exponent);
    unsigned __int128 turns = window * m;
    int64_t whole = (int64_t)(turns >> 126) + (int64_t)(turns >> 125 & 1);
    turns -= (unsigned __int128)whole << 126;
    int64_t high = (int64_t)(turns >> 64), low = (int64_t)((uint64_t)turns >> 11);
    double r = ((double)high * 0x1p-62 + (double)low * 0x1p-115) * 0x1.921fb54442d18p+0;
    *n = (int)(x < 0 ? -whole : whole) & 3;
    return x < 0 ? -r : r;
}
static double turned_sine(double r, int n) {
    static const double S[4] = {-0x1.555555545dca6p-3, 0x1.11110dee91a4fp-7,
                                -0x1.a013a6c06f5e8p-13, 0x1.6dbdc3bcca7f5p-19};
    static const double C[4] = {-0x1.fffffffab078ep-2, 0x1.55554cb996961p-5,
                                -0x1.6c0e075d62620p-10, 0x1.9a6ecdb583f44p-16};
    double z = r * r;
    double y = n & 1 ? z * polynomial(z, C, 4) + 1 : r * (z * polynomial(z, S, 4) + 1);
    return n & 2 ? -y : y;
}
static double sin_of(double x) {
    int n;
    double r = remainder_of(x, &n);
    return turned_sine(r, n);
}
static double cos_of(double x) {
    int n;
    double r = remainder_of(x, &n);
    return turned_sine(r, n + 1);
}
void reference_function(int32_t number, const float *x, float *y, int64_t size) {
    double (*const of[])(double) = {exp_of, log_of, tanh_of, sigmoid_of,
                                    erf_of, sin_of, cos_of};
    for (int64_t i = 0; i < size; i++)
        y[i] = number < 7 ? (float)of[number](x[i]) : 1 / sqrtf(x[i]);
}

/* The error of y in units in the last place of the C library's result in double. Where
 * a NaN, an infinity (beyond the largest float) or the sign of a zero is missing, or
 * should not be there, it is infinite. */
static double error_of(float y, double exact) {
    float nearest = (float)exact;
    if (isnan(y) || isnan(nearest)) return isnan(y) && isnan(nearest) ? 0 : INFINITY;
    if (isinf(y) || isinf(nearest)) return y == nearest ? 0 : INFINITY;
    if (nearest == 0 && signbit(y) != signbit(nearest)) return INFINITY;
    int exponent = exact == 0 ? -126 : ilogb(exact);
    return fabs(y - exact) * ldexp(1, 23 - (exponent < -126 ? -126 : exponent));
}
static int have_same_bits(float x, float y) { return memcmp(&x, &y, sizeof x) == 0; }

static double sigmoid_exact(double x) { return 1 / (1 + exp(-x)); }
static double rsqrt_exact(double x) { return 1 / sqrt(x); }
/* The largest error of y, or 0.5 if none is larger: nearly all results are the floats
 * nearest to the exact ones, and those are not measured. */
double reference_error(int32_t number, const float *x, const float *y, int64_t size) {
    double (*const of[])(double) = {exp, log, tanh, sigmoid_exact,
                                    erf, sin, cos,  rsqrt_exact};
    double largest = 0.5;
    for (int64_t i = 0; i < size; i++) {
        double exact = of[number](x[i]);
        if (have_same_bits(y[i], (float)exact)) continue;
        double error = error_of(y[i], exact);
        if (error > largest) largest = error;
    }
    return largest;
}
