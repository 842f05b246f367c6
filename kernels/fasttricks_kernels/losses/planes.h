/* Cross-entropy of planes: (N, K, pixels) logits, whose classes lie `pixels` apart, a block of pixels side by side.
 *
 * The maths is that of losses.c's by_targets, which a pixel's vector lane does alone: no bit depends on the other pixels. */
#pragma once
#include "batch.h"

#define PIXELS 128 /* of a block */
#define VECTORS (PIXELS / LANES)
#define CLASSES 32 /* numbers of a float sum; the sums of these sums are double */

INLINE vf load_some(const float *x, int64_t left) { return left >= LANES ? load(x) : load_part(x, left, 0); }

INLINE void store_some(float *x, int64_t left, vf v) {
    if (left >= LANES) *(vf_anywhere *)x = v;
    else store_part(x, left, v);
}

/* What a pixel's targets are made of. labelled, even: the share of its label, and that of each class, before class weights. */
typedef struct {
    vi label[VECTORS];
    vf labelled[VECTORS], even[VECTORS];
    const float *dense; /* or the targets themselves, of class 0 */
} PlaneTargets;

/* The labels of a block, those ignored counted; 0 where one is out of range. */
INLINE int weigh_plane(const Batch *b, int64_t n, int64_t first, int64_t count, PlaneTargets *out, Ignored *ignored) {
    memset(out, 0, sizeof *out);
    for (int64_t i = 0; i < count; i++) {
        const int64_t label = label_at(b->target, b->target_bytes, n * b->pixels + first + i);
        int32_t class = (int32_t)label;
        float share = 1;
        if (b->has_ignore && label == b->ignore) {
            class = -1, share = 0;
            ignored->labels[0]++, ignored->rows++;
        } else if (label < 0 || label >= b->K) return 0;
        out->label[i / LANES][i % LANES] = class;
        out->labelled[i / LANES][i % LANES] = (1 - b->uniform) * share;
        out->even[i / LANES][i % LANES] = share * b->uniform / b->K;
    }
    return 1;
}

INLINE vf plane_target(const Batch *b, const PlaneTargets *of, int64_t k, int64_t v, int64_t left) {
    const float weight = b->weight ? b->weight[k] : 1;
    if (of->dense) {
        const vf t = load_some(of->dense + k * b->pixels + v * LANES, left);
        return ((1 - b->uniform) * t + b->uniform / b->K) * weight;
    }
    const vi here = of->label[v] == (int32_t)k;
    return ((vf)((vi)of->labelled[v] & here) + of->even[v]) * weight;
}

INLINE void add_to(double *sums, const vf *parts) {
    for (int64_t i = 0; i < PIXELS; i++) sums[i] += parts[i / LANES][i % LANES];
}

/* Losses and gradient of the pixels [first, first + count) of image n; g: of class 0, classes `apart`. 0 where a label is bad. */
static int plane(const Batch *b, int64_t n, int64_t first, int64_t count, float *g, int64_t apart, Ignored *ignored) {
    const int64_t K = b->K, start = n * K * b->pixels + first, vectors = (count + LANES - 1) / LANES;
    const float *x = b->logits + start;
    PlaneTargets of;
    if (b->dense) of.dense = b->dense + start;
    else if (!weigh_plane(b, n, first, count, &of, ignored)) return 0;
    vf max[VECTORS], factor[VECTORS], parts[3][VECTORS];
    double sum[PIXELS] = {0}, total[PIXELS] = {0}, cross[PIXELS] = {0};
    for (int64_t v = 0; v < vectors; v++) max[v] = (vf){0} - INFINITY;
    for (int64_t k = 0; k < K; k++)
        for (int64_t v = 0; v < vectors; v++) max[v] = larger(load_some(x + k * b->pixels + v * LANES, count - v * LANES), max[v]);
    for (int64_t from = 0; from < K; from += CLASSES) {
        memset(parts, 0, sizeof parts);
        for (int64_t k = from; k < from + CLASSES && k < K; k++) {
            for (int64_t v = 0; v < vectors; v++) {
                const int64_t left = count - v * LANES;
                const vf d = load_some(x + k * b->pixels + v * LANES, left) - max[v], e = exp_of(d);
                const vf q = plane_target(b, &of, k, v, left), term = q * d;
                store_some(g + k * apart + v * LANES, left, e);
                parts[0][v] += e;
                parts[1][v] += q;
                parts[2][v] += (vf)((vi)term & (q != 0.0f)); /* not 0 * -infinity */
            }
        }
        add_to(sum, parts[0]);
        add_to(total, parts[1]);
        add_to(cross, parts[2]);
    }
    for (int64_t i = 0; i < count; i++) {
        const int weighs = b->dense || of.label[i / LANES][i % LANES] >= 0;
        b->loss[n * b->pixels + first + i] = weighs ? total[i] * log(sum[i]) - cross[i] : 0;
        factor[i / LANES][i % LANES] = total[i] / sum[i];
    }
    for (int64_t k = 0; k < K; k++) {
        for (int64_t v = 0; v < vectors; v++) {
            const int64_t left = count - v * LANES;
            float *at = g + k * apart + v * LANES;
            vf value = load_some(at, left) * factor[v] - plane_target(b, &of, k, v, left);
            if (!b->dense) value = (vf)((vi)value & (of.label[v] >= 0)); /* not 0 * NaN, where it is ignored */
            store_some(at, left, value);
        }
    }
    return 1;
}
