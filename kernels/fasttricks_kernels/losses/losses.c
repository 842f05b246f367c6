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
 * With class weights c, or a dense target t in the labels' place, q_k are the row's targets and W is their sum:
 *
 *     cross-entropy: loss = W log sum exp(d) - sum_k q_k d_k,    grad = W softmax(x) - q
 *                    q_k = c_k (sum_y w_y (1 - u) [k = y] + w u / K),    or c_k ((1 - u) t_k + u / K)
 *
 * Rows are independent: their bits do not depend on how many threads share them, nor on the width of the CPU's vectors (a sum
 * is of LANES partial sums), only on whether it has a fused multiply-add.
 */
#include "batch.h"
#include "planes.h"

#include <stdlib.h>

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

/* Without smoothing the labels' classes alone count. */
INLINE void weigh_classes(const Batch *b, Weighed *row) {
    row->total = 0;
    for (int i = 0; i < 2; i++)
        if (row->weight[i]) row->total += row->weight[i] *= b->weight[row->label[i]];
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

static double sum_of_row(const float *q, int64_t K) {
    double sum = 0;
    for (int64_t first = 0; first < K; first += BLOCK) {
        const int64_t end = first + BLOCK < K ? first + BLOCK : K;
        vf total = {0};
        int64_t k = first;
        for (; k + LANES <= end; k += LANES) total += load(q + k);
        sum += sum_of(total);
        for (; k < end; k++) sum += q[k];
    }
    return sum;
}

/* A row's targets: labels with class weights, or dense. */
INLINE void targets(const Batch *b, int64_t n, const Weighed *row, float *q) {
    const float even = b->uniform / b->K, *c = b->weight;
    if (b->dense) {
        const float *t = b->dense + n * b->K;
        for (int64_t k = 0; k < b->K; k++) q[k] = (1 - b->uniform) * t[k] + even;
    } else {
        for (int64_t k = 0; k < b->K; k++) q[k] = row->total * even;
        for (int i = 0; i < 2; i++)
            if (row->weight[i]) q[row->label[i]] += (1 - b->uniform) * row->weight[i];
    }
    if (c)
        for (int64_t k = 0; k < b->K; k++) q[k] *= c[k];
}

/* Cross-entropy with the targets q, K numbers that are written here. */
static void by_targets(const Batch *b, int64_t n, const Weighed *row, float *g, float *q) {
    const int64_t K = b->K;
    const float *x = b->logits + n * b->stride, max = max_of(x, K);
    double unused;
    const double sum = exponentials(x, K, max, 1.0f, g, &unused);
    targets(b, n, row, q);
    const double total = sum_of_row(q, K);
    const float factor = total / sum;
    for (int64_t k = 0; k < K; k++) g[k] = g[k] * factor - q[k];
    b->loss[n] = total * log(sum) - weighted_sum(q, x, K, max);
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

INLINE void count_ignored(Batch *b, const Ignored *ignored) {
    __atomic_fetch_add(&b->ignored, ignored->labels[0], __ATOMIC_RELAXED);
    __atomic_fetch_add(&b->ignored_b, ignored->labels[1], __ATOMIC_RELAXED);
    __atomic_fetch_add(&b->weightless, ignored->rows, __ATOMIC_RELAXED);
}

/* The work of a thread on planes: takes blocks of pixels until none is left. */
static void work_on_planes(Batch *b) {
    const int64_t blocks = (b->pixels + PIXELS - 1) / PIXELS;
    float *scratch = b->grad ? NULL : malloc(PIXELS * b->K * sizeof *scratch);
    if (!b->grad && !scratch) {
        __atomic_store_n(&b->status, 2, __ATOMIC_RELAXED);
        return;
    }
    Ignored ignored = {{0, 0}, 0};
    int64_t begin;
    while ((begin = __atomic_fetch_add(&b->next, b->chunk, __ATOMIC_RELAXED)) < b->N * blocks) {
        for (int64_t unit = begin; unit < begin + b->chunk && unit < b->N * blocks; unit++) {
            const int64_t n = unit / blocks, first = unit % blocks * PIXELS;
            const int64_t count = b->pixels - first < PIXELS ? b->pixels - first : PIXELS;
            float *g = b->grad ? b->grad + n * b->K * b->pixels + first : scratch;
            if (!plane(b, n, first, count, g, b->grad ? b->pixels : PIXELS, &ignored))
                __atomic_store_n(&b->status, 1, __ATOMIC_RELAXED);
        }
    }
    count_ignored(b, &ignored);
    free(scratch);
}

/* The work of a thread: takes rows until none is left. */
static void work(void *batch) {
    Batch *b = batch;
    if (b->pixels) {
        work_on_planes(b);
        return;
    }
    const int by_all = b->dense || (b->weight && b->uniform);
    const int64_t rows = (b->teacher ? 2 : by_all) + (b->grad ? 0 : 1);
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
            Weighed row = {.total = 1};
            if (!b->dense && !weigh(b, n, &row, &ignored)) {
                __atomic_store_n(&b->status, 1, __ATOMIC_RELAXED);
            } else if (row.total == 0) {
                b->loss[n] = 0;
                memset(grad, 0, b->K * sizeof *grad);
            } else if (b->teacher) {
                distillation(b, n, &row, grad, scratch);
            } else if (by_all) {
                by_targets(b, n, &row, grad, scratch);
            } else {
                if (b->weight) weigh_classes(b, &row);
                cross_entropy(b, n, &row, grad);
            }
        }
    }
    count_ignored(b, &ignored);
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
