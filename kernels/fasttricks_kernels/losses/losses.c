/* The losses of float32 rows on the CPU: losses, and the gradient of their sum, while a row lies in the cache.
 *
 * The maths is reference.py's: with weights w_y of a row's one or two labels, W their sum, u the share of the
 * target that is spread evenly over all K classes,
 *
 *     cross-entropy: loss = W log sum exp(d) - (1 - u) sum_y w_y d_y - W u / K sum_k d_k,    d = x - max x
 *                    grad = W softmax(x) - (1 - u) w at the labels - W u / K
 *     distillation:  loss = hard (that) + soft W T^2 (log sum exp(d / T) - sum_k q_k d_k / T),    q = softmax(teacher / T)
 *                    grad = hard (that) + soft W T (softmax(x / T) - q)
 *
 * Rows are independent: their bits do not depend on how many threads share them, nor on the width of the CPU's vectors (a sum
 * is of LANES partial sums), only on whether it has a fused multiply-add.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
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

static float max_of(const float *x, int64_t K) {
    vf most = (vf){0} - INFINITY;
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) most = larger(load(x + k), most);
    if (k < K) most = larger(load_part(x + k, K - k, -INFINITY), most);
    float max = most[0];
    for (int lane = 1; lane < LANES; lane++) max = most[lane] > max ? most[lane] : max;
    return max;
}

/* exp(coldness (x - max)) into e; returns the sum of them, and of the x - max in *sum_d. */
INLINE double exponentials(const float *x, int64_t K, float max, float coldness, float *e, double *sum_d) {
    double sum = 0;
    *sum_d = 0;
    for (int64_t first = 0; first < K; first += BLOCK) {
        const int64_t end = first + BLOCK < K ? first + BLOCK : K;
        vf total = {0}, total_d = {0};
        int64_t k = first;
        for (; k + LANES <= end; k += LANES) {
            vf d = load(x + k) - max, exp_d = exp_of(coldness * d);
            *(vf_anywhere *)(e + k) = exp_d;
            total += exp_d;
            total_d += d;
        }
        if (k < end) { /* the row's last few */
            vf d = load_part(x + k, end - k, max) - max, exp_d = exp_of(coldness * d);
            store_part(e + k, end - k, exp_d);
            const vi live = first_lanes(end - k);
            exp_d = (vf)((vi)exp_d & live);
            d = (vf)((vi)d & live);
            total += exp_d;
            total_d += d;
        }
        sum += sum_of(total);
        *sum_d += sum_of(total_d);
    }
    return sum;
}

/* sum of q (x - max), where a q of 0 counts nothing, though x be -infinity. */
static double weighted_sum(const float *q, const float *x, int64_t K, float max) {
    double sum = 0;
    for (int64_t first = 0; first < K; first += BLOCK) {
        const int64_t end = first + BLOCK < K ? first + BLOCK : K;
        vf total = {0};
        int64_t k = first;
        for (; k + LANES <= end; k += LANES) {
            vf weight = load(q + k), term = weight * (load(x + k) - max);
            total += (vf)((vi)term & (weight != 0.0f));
        }
        sum += sum_of(total);
        for (; k < end; k++) sum += q[k] ? q[k] * (x[k] - max) : 0;
    }
    return sum;
}

typedef struct {
    int64_t N, K;
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

/* The labels of row n, those ignored counted; 0 where a label or lam is out of range. */
INLINE int weigh(const Batch *b, int64_t n, Weighed *out, Ignored *ignored) {
    const int labels = b->target_b ? 2 : 1;
    const float share = b->target_b ? b->lam[n * b->lam_stride] : 1.0f;
    *out = (Weighed){{label_at(b->target, b->target_bytes, n), 0}, {share, 1.0f - share}, 0.0f};
    if (b->target_b) out->label[1] = label_at(b->target_b, b->target_b_bytes, n);
    if (!(share >= 0 && share <= 1)) return 0;
    for (int i = 0; i < labels; i++) {
        if (b->has_ignore && out->label[i] == b->ignore) {
            out->weight[i] = 0;
            ignored->labels[i]++;
        } else if (out->label[i] < 0 || out->label[i] >= b->K) return 0;
        out->total += out->weight[i];
    }
    ignored->rows += out->total == 0;
    return 1;
}

/* Takes the labels' share from a gradient in which cross-entropy weighs `hard`, and returns what they add to sum_k q_k d_k. */
INLINE double at_labels(const Weighed *row, float uniform, const float *x, float max, float hard, float *grad) {
    double cross = 0;
    for (int i = 0; i < 2; i++) {
        const float weight = (1 - uniform) * row->weight[i];
        if (weight == 0) continue; /* not 0 * -infinity */
        cross += weight * (double)(x[row->label[i]] - max);
        grad[row->label[i]] -= hard * weight;
    }
    return cross;
}

static void cross_entropy(const Batch *b, int64_t n, const Weighed *row, float *g) {
    const int64_t K = b->K;
    const float *x = b->logits + n * b->stride;
    const float max = max_of(x, K);
    double sum_d;
    const double sum = exponentials(x, K, max, 1.0f, g, &sum_d);
    const float factor = row->total / sum, shift = row->total * b->uniform / K;
    for (int64_t k = 0; k < K; k++) g[k] = g[k] * factor - shift;
    const double at_all = b->uniform ? shift * sum_d : 0; /* not 0 * -infinity */
    b->loss[n] = row->total * log(sum) - at_all - at_labels(row, b->uniform, x, max, 1.0f, g);
}

/* scratch: 2 K numbers. */
static void distillation(const Batch *b, int64_t n, const Weighed *row, float *g, float *scratch) {
    const int64_t K = b->K;
    const float *x = b->logits + n * b->stride, *t = b->teacher + n * K;
    float *s = scratch, *q = scratch + K; /* exp(d / T), and the teacher's */
    const float max = max_of(x, K), teacher_max = max_of(t, K), coldness = 1 / b->temperature;
    double sum_d, unused;
    const double sum = exponentials(x, K, max, 1.0f, g, &sum_d);
    const double soft_sum = exponentials(x, K, max, coldness, s, &unused);
    const double teacher_sum = exponentials(t, K, teacher_max, coldness, q, &unused);
    const float softness = b->soft * row->total * b->temperature;
    const double teacher_cross = weighted_sum(q, x, K, max) / teacher_sum;
    const float factor = b->hard * row->total / sum, shift = b->hard * row->total * b->uniform / K;
    const float soft_factor = softness / soft_sum, teacher_factor = softness / teacher_sum;
    for (int64_t k = 0; k < K; k++) g[k] = g[k] * factor - shift + (s[k] * soft_factor - q[k] * teacher_factor);
    const double at_all = b->uniform ? row->total * b->uniform / K * sum_d : 0;
    const double labelled = row->total * log(sum) - at_all - at_labels(row, b->uniform, x, max, b->hard, g);
    b->loss[n] = b->hard * labelled + softness * (b->temperature * log(soft_sum) - teacher_cross);
}

/* The work of a thread: takes rows until none is left. */
static void work(void *batch) {
    Batch *b = batch;
    const int64_t rows = (b->teacher ? 2 : 0) + (b->grad ? 0 : 1);
    float *scratch = rows ? malloc(rows * b->K * sizeof *scratch) : NULL;
    if (rows && !scratch) {
        __atomic_store_n(&b->status, 2, __ATOMIC_RELAXED);
        return;
    }
    Ignored ignored = {{0, 0}, 0};
    int64_t first;
    while ((first = __atomic_fetch_add(&b->next, b->chunk, __ATOMIC_RELAXED)) < b->N) {
        for (int64_t n = first; n < first + b->chunk && n < b->N; n++) {
            float *grad = b->grad ? b->grad + n * b->K : scratch + (rows - 1) * b->K;
            Weighed row;
            if (!weigh(b, n, &row, &ignored)) {
                __atomic_store_n(&b->status, 1, __ATOMIC_RELAXED);
            } else if (row.total == 0) {
                b->loss[n] = 0;
                memset(grad, 0, b->K * sizeof *grad);
            } else if (b->teacher) {
                distillation(b, n, &row, grad, scratch);
            } else {
                cross_entropy(b, n, &row, grad);
            }
        }
    }
    __atomic_fetch_add(&b->ignored, ignored.labels[0], __ATOMIC_RELAXED);
    __atomic_fetch_add(&b->ignored_b, ignored.labels[1], __ATOMIC_RELAXED);
    __atomic_fetch_add(&b->weightless, ignored.rows, __ATOMIC_RELAXED);
    free(scratch);
}

/* parallel: an OpenMP runtime's GOMP_parallel, or NULL. torch's own pool must be the one: its threads spin for a while after
 * their work, and would take the cores from another's. */
int32_t fasttricks_losses(Batch *batch, uint32_t threads,
                          void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    if (parallel && threads > 1) parallel(work, batch, threads, 0);
    else work(batch);
    return batch->status;
}
