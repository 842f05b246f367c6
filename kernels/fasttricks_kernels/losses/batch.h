/* The argument of losses.c, and the labels within it. */
#pragma once
#include "vectors.h"

typedef struct {
    int64_t N, K;
    int64_t pixels;                   /* 0: rows; else logits, gradient and dense are (N, K, pixels), losses and target (N, pixels) */
    const float *logits;
    int64_t stride;                   /* from row to row */
    const void *target, *target_b;    /* target_b may be NULL: then `target` alone counts */
    int32_t target_bytes, target_b_bytes; /* 8, 4: int64, int32; 1: uint8 */
    const float *lam;                 /* the weight of `target`, of one of two */
    int64_t lam_stride;               /* 0 where one serves all rows */
    int64_t ignore;                   /* a label that weighs nothing, if has_ignore */
    int32_t has_ignore;
    float uniform; /* share of the target that is spread evenly over all K classes */
    const float *teacher; /* rows K apart, or NULL: no distillation */
    float temperature, hard, soft;
    const float *weight; /* of the K classes, or NULL */
    const float *dense;  /* targets in the place of labels, rows K apart, or NULL; then nothing is ignored */
    float *loss, *grad; /* N, and rows K apart; grad may be NULL: then none is wanted */
    /* of the work */
    int64_t chunk, next; /* rows a thread takes at a time, and the first that none has taken */
    int64_t ignored, ignored_b, weightless; /* counted: labels that are ignored, of target and target_b; rows of weight 0 */
    int32_t status;      /* 0; 1: a label is neither in [0, K) nor ignored, or lam not in [0, 1]; 2: no memory. Then the results are invalid */
} Batch;

typedef struct {
    int64_t label[2];
    float weight[2], total;
} Weighed;

typedef struct {
    int64_t labels[2], rows;
} Ignored;

INLINE int64_t label_at(const void *labels, int32_t bytes, int64_t n) {
    return bytes == 8 ? ((const int64_t *)labels)[n] : bytes == 4 ? ((const int32_t *)labels)[n] : ((const uint8_t *)labels)[n];
}
