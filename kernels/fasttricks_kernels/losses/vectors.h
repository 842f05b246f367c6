/* Vectors of LANES floats: loads of any alignment, exp, sums. Nothing here depends on the width of the CPU's vectors. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "fast math loses NaN and infinity"
#endif

#define LANES 8
#define BLOCK 512 /* numbers of a float sum; the sums of these sums are double */
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef vf vf_anywhere __attribute__((aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

/* exp of x <= 0 to an ulp or two: 2^n e^r, |r| <= log(2) / 2, by Taylor's series, whose next term is 5e-9. Below -87, where
 * 2^n would leave the normal numbers, 0; of NaN, NaN. */
INLINE vf exp_of(vf x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: added, it leaves the nearest integer in the lowest bits */
    vf shifted = x * 1.44269504f + round;
    vf n = shifted - round;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f; /* log 2 in two parts, the first of so few bits that n times it is exact */
    vf p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vi power = (vi)p + ((vi)shifted << 23);
    return (vf)(power & ~(vi)(x < -87.0f));
}

INLINE vf load(const float *x) { return *(const vf_anywhere *)x; }

/* The first `left` of LANES: all bits set. */
INLINE vi first_lanes(int64_t left) {
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return lane < (int32_t)left;
}

/* The last `left` < LANES numbers of a row, the other lanes `fill`. */
INLINE vf load_part(const float *x, int64_t left, float fill) {
    vf part = fill - (vf){0};
    switch (left) {
        case 7: part[6] = x[6]; /* fall through */
        case 6: part[5] = x[5]; /* fall through */
        case 5: part[4] = x[4]; /* fall through */
        case 4: part[3] = x[3]; /* fall through */
        case 3: part[2] = x[2]; /* fall through */
        case 2: part[1] = x[1]; /* fall through */
        case 1: part[0] = x[0];
    }
    return part;
}

INLINE void store_part(float *x, int64_t left, vf part) {
    switch (left) {
        case 7: x[6] = part[6]; /* fall through */
        case 6: x[5] = part[5]; /* fall through */
        case 5: x[4] = part[4]; /* fall through */
        case 4: x[3] = part[3]; /* fall through */
        case 3: x[2] = part[2]; /* fall through */
        case 2: x[1] = part[1]; /* fall through */
        case 1: x[0] = part[0];
    }
}

INLINE double sum_of(vf v) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

INLINE vf larger(vf a, vf b) { /* of NaN, b: it is left to the sums */
    vi above = a > b;
    return (vf)(((vi)a & above) | ((vi)b & ~above));
}
