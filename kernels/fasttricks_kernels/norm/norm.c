/* Batch norm, the addition of a residual and ReLU or ReLU6 of float32 pixels on the CPU: R rows of C channels that lie side by side.
 *
 *     y = act(weight (x - mean) rstd + bias + residual)
 *     gradient of x = weight rstd (g - mean(g) - (x - mean) rstd^2 mean(g (x - mean))),    g the gradient of y, masked
 *
 * The rows are cut in parts by the shape alone, threads take parts, and the parts' sums are added in their order: the bits do
 * not depend on the number of threads. No sum is across channels, and no product is fused with a sum (-ffp-contract=off), so they
 * do not depend on the CPU's vectors either, and backward finds the mask of the y that forward stored by computing it again.
 */
#include <math.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#ifdef __FAST_MATH__
#error "fast math loses NaN and infinity"
#endif

#define CHANNELS 512 /* of a strip, whose sums stay in the first cache */
#define GROUP 4      /* rows that are added before a sum is touched */
#define FLUSH 32     /* rows of a float sum; the sums of these sums are double */
#define PILOTS 16    /* rows whose mean the statistics are taken about */
#define INLINE static inline __attribute__((always_inline))

typedef struct Batch {
    int64_t R, C;
    int64_t x_stride, residual_stride, grad_stride, second_stride; /* from row to row; all else is dense */
    const float *x, *residual, *y, *grad, *second; /* residual, y and second may be NULL; the gradients grad and second are added */
    const float *weight, *bias;                    /* may be NULL: 1 and 0 */
    float *running_mean, *running_var;             /* may be NULL, in training */
    float *numbers;       /* 4 C: mean, rstd, scale = weight rstd, shift; made by forward, or, for normalise, by the caller */
    float *out;           /* y, or the gradient of x, or NULL if that is not wanted */
    float *grad_residual; /* or NULL: then the mask is that of y computed again */
    float *grad_weight, *grad_bias;
    double *parts;  /* 2 P C: the parts' sums */
    double *totals; /* 2 C: of all parts the mean and the sum of squared distances from it, or the sums of g and g (x - mean) */
    float *means;   /* 2 C: of g, and of g (x - mean) rstd^2; 0 in evaluation */
    double momentum, eps;
    int32_t act, training; /* act 0: none, 1: ReLU, 2: ReLU6 */
    int32_t stream;        /* results that no cache holds until they are read: past the caches, whose lines would be read first */
    int64_t rows;          /* of a part */
    /* of the work */
    int64_t next; /* the first part that no thread has taken */
    void (*phase)(const struct Batch *, int64_t, int64_t, int64_t);
} Batch;

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

INLINE float activated(float x, float mean, float scale, float shift, float residual, int act) {
    float y = (x - mean) * scale + shift + residual;
    if (act) y = y <= 0 ? 0 : y; /* a NaN stays */
    if (act == 2) y = y >= 6 ? 6 : y;
    return y;
}

INLINE float masked(float g, float y, int act) {
    if (act) g = y <= 0 ? 0 : g;
    if (act == 2) g = y >= 6 ? 0 : g;
    return g;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* A strip of a row of results, made in the first cache. */
INLINE void put(const Batch *b, float *out, const float *made, int64_t n) {
#ifdef __AVX__
    if (b->stream && ((uintptr_t)out | (n * sizeof *out)) % 32 == 0) {
        for (int64_t c = 0; c < n; c += 8) _mm256_stream_ps(out + c, _mm256_load_ps(made + c));
        return;
    }
#endif
    memcpy(out, made, n * sizeof *out);
}

/* Adds float sums to the part's double ones, and begins new ones. */
INLINE void flush(double *total, float *sum, int64_t n) {
    for (int64_t c = 0; c < n; c++) {
        total[c] += sum[c];
        sum[c] = 0;
    }
}

/* A part: mean, and sum of squared distances from it. */
static void statistics(const Batch *b, int64_t part, int64_t first, int64_t stop) {
    const int64_t C = b->C, S = b->x_stride, P = (b->R + b->rows - 1) / b->rows;
    for (int64_t c0 = 0; c0 < C; c0 += CHANNELS) {
        const int64_t n = least(CHANNELS, C - c0), pilots = least(PILOTS, stop - first);
        const float *restrict x = b->x + c0;
        double *restrict sums = b->parts + part * C + c0, *restrict squares = b->parts + (P + part) * C + c0;
        float pilot[CHANNELS], sum[CHANNELS], square[CHANNELS];
        for (int64_t c = 0; c < n; c++) pilot[c] = sum[c] = square[c] = 0, sums[c] = squares[c] = 0;
        for (int64_t r = first; r < first + pilots; r++)
            for (int64_t c = 0; c < n; c++) pilot[c] += x[r * S + c];
        for (int64_t c = 0; c < n; c++) pilot[c] /= pilots;
        for (int64_t r0 = first; r0 < stop; r0 += FLUSH) {
            const int64_t end = least(r0 + FLUSH, stop);
            int64_t r = r0;
            for (; r + GROUP <= end; r += GROUP) {
                const float *restrict p = x + r * S, *restrict q = p + S, *restrict s = q + S, *restrict t = s + S;
                for (int64_t c = 0; c < n; c++) {
                    const float d0 = p[c] - pilot[c], d1 = q[c] - pilot[c], d2 = s[c] - pilot[c], d3 = t[c] - pilot[c];
                    sum[c] += (d0 + d1) + (d2 + d3);
                    square[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
                }
            }
            for (; r < end; r++)
                for (int64_t c = 0; c < n; c++) {
                    const float d = x[r * S + c] - pilot[c];
                    sum[c] += d;
                    square[c] += d * d;
                }
            flush(sums, sum, n);
            flush(squares, square, n);
        }
        const double count = stop - first;
        for (int64_t c = 0; c < n; c++) {
            const double shift = sums[c] / count, about = squares[c] - sums[c] * shift;
            sums[c] = pilot[c] + shift;
            squares[c] = about < 0 ? 0 : about;
        }
    }
}

/* The totals of the parts. */
static void merge_statistics(const Batch *b, int64_t P) {
    const int64_t C = b->C;
    for (int64_t c = 0; c < C; c++) {
        const double first = b->parts[c];
        double moved = 0, square = 0;
        for (int64_t p = 0; p < P; p++) {
            const double count = least(b->rows, b->R - p * b->rows), d = b->parts[p * C + c] - first;
            moved += count * d;
            square += b->parts[(P + p) * C + c] + count * d * d;
        }
        const double shift = moved / b->R, about = square - moved * shift;
        b->totals[c] = first + shift;
        b->totals[C + c] = about < 0 ? 0 : about;
    }
}

/* The numbers from the totals, which also move the running statistics; or, in evaluation, from those. The shift is the bias,
 * less the scale times the rest of the mean beyond its rounding: in a channel of nearly equal values it would show. */
static void prepare(const Batch *b) {
    const int64_t C = b->C;
    for (int64_t c = 0; c < C; c++) {
        double mean, var;
        if (b->training) {
            const double square = b->totals[C + c];
            mean = b->totals[c];
            var = square / b->R;
            if (b->running_mean) {
                b->running_mean[c] = (1 - b->momentum) * b->running_mean[c] + b->momentum * mean;
                b->running_var[c] = (1 - b->momentum) * b->running_var[c] + b->momentum * (square / (b->R - 1));
            }
        } else {
            mean = b->running_mean[c];
            var = b->running_var[c];
        }
        const float rounded = mean, rstd = 1 / sqrt(var + b->eps), scale = b->weight ? b->weight[c] * rstd : rstd;
        b->numbers[c] = rounded;
        b->numbers[C + c] = rstd;
        b->numbers[2 * C + c] = scale;
        b->numbers[3 * C + c] = (b->bias ? b->bias[c] : 0) + (rounded - mean) * scale;
    }
}

INLINE void normalise_as(const Batch *b, int64_t first, int64_t stop, int act, int with_residual) {
    const int64_t C = b->C;
    const float *restrict mean = b->numbers, *restrict scale = mean + 2 * C, *restrict shift = mean + 3 * C;
    for (int64_t r = first; r < stop; r++) {
        const float *restrict x = b->x + r * b->x_stride;
        const float *restrict residual = with_residual ? b->residual + r * b->residual_stride : x;
        for (int64_t c0 = 0; c0 < C; c0 += CHANNELS) {
            const int64_t n = least(CHANNELS, C - c0);
            _Alignas(32) float y[CHANNELS];
            for (int64_t c = 0; c < n; c++)
                y[c] = activated(x[c0 + c], mean[c0 + c], scale[c0 + c], shift[c0 + c], with_residual ? residual[c0 + c] : 0, act);
            put(b, b->out + r * C + c0, y, n);
        }
    }
}

static void normalise(const Batch *b, int64_t part, int64_t first, int64_t stop) {
    (void)part;
    switch (2 * b->act + (b->residual != NULL)) {
    case 0: normalise_as(b, first, stop, 0, 0); break;
    case 1: normalise_as(b, first, stop, 0, 1); break;
    case 2: normalise_as(b, first, stop, 1, 0); break;
    case 3: normalise_as(b, first, stop, 1, 1); break;
    case 4: normalise_as(b, first, stop, 2, 0); break;
    default: normalise_as(b, first, stop, 2, 1);
    }
}

/* A strip of a row of y's gradient where it lies, or of the sum of two gradients, made in the first cache. */
INLINE const float *incoming(const Batch *b, int64_t r, int64_t c0, int64_t n, float *restrict made) {
    const float *restrict g = b->grad + r * b->grad_stride + c0;
    if (!b->second) return g;
    const float *restrict h = b->second + r * b->second_stride + c0;
    for (int64_t c = 0; c < n; c++) made[c] = g[c] + h[c];
    return made;
}

/* A part: sums of g and g (x - mean); g is `written` for a residual, whose mask is in y. */
INLINE void sums_as(const Batch *b, int64_t part, int64_t first, int64_t stop, int act, int with_y, int written) {
    const int64_t C = b->C, S = b->x_stride, P = (b->R + b->rows - 1) / b->rows;
    for (int64_t c0 = 0; c0 < C; c0 += CHANNELS) {
        const int64_t n = least(CHANNELS, C - c0);
        const float *restrict mean = b->numbers + c0, *restrict scale = mean + 2 * C, *restrict shift = mean + 3 * C;
        double *restrict sums = b->parts + part * C + c0, *restrict products = b->parts + (P + part) * C + c0;
        float sum[CHANNELS], product[CHANNELS], added0[CHANNELS], added1[CHANNELS];
        for (int64_t c = 0; c < n; c++) sum[c] = product[c] = 0, sums[c] = products[c] = 0;
        for (int64_t r0 = first; r0 < stop; r0 += FLUSH) {
            const int64_t end = least(r0 + FLUSH, stop);
            int64_t r = r0;
            for (; r + 2 <= end; r += 2) {
                const float *restrict x0 = b->x + r * S + c0, *restrict x1 = x0 + S;
                const float *restrict g0 = incoming(b, r, c0, n, added0), *restrict g1 = incoming(b, r + 1, c0, n, added1);
                const float *restrict y0 = with_y ? b->y + r * C + c0 : x0, *restrict y1 = with_y ? y0 + C : x1;
                _Alignas(32) float out0[CHANNELS], out1[CHANNELS];
                for (int64_t c = 0; c < n; c++) {
                    const float d0 = x0[c] - mean[c], d1 = x1[c] - mean[c];
                    const float v0 = with_y ? y0[c] : activated(x0[c], mean[c], scale[c], shift[c], 0, act);
                    const float v1 = with_y ? y1[c] : activated(x1[c], mean[c], scale[c], shift[c], 0, act);
                    const float m0 = masked(g0[c], v0, act), m1 = masked(g1[c], v1, act);
                    if (written) out0[c] = m0, out1[c] = m1;
                    sum[c] += m0 + m1;
                    product[c] += m0 * d0 + m1 * d1;
                }
                if (written) {
                    put(b, b->grad_residual + r * C + c0, out0, n);
                    put(b, b->grad_residual + (r + 1) * C + c0, out1, n);
                }
            }
            for (; r < end; r++) {
                const float *restrict g0 = incoming(b, r, c0, n, added0);
                for (int64_t c = 0; c < n; c++) {
                    const float x = b->x[r * S + c0 + c];
                    const float y = with_y ? b->y[r * C + c0 + c] : activated(x, mean[c], scale[c], shift[c], 0, act);
                    const float g = masked(g0[c], y, act);
                    if (written) b->grad_residual[r * C + c0 + c] = g;
                    sum[c] += g;
                    product[c] += g * (x - mean[c]);
                }
            }
            flush(sums, sum, n);
            flush(products, product, n);
        }
    }
}

static void sums(const Batch *b, int64_t part, int64_t first, int64_t stop) {
    switch (2 * b->act + (b->grad_residual != NULL)) {
    case 0: sums_as(b, part, first, stop, 0, 0, 0); break;
    case 1: sums_as(b, part, first, stop, 0, 0, 1); break;
    case 2: sums_as(b, part, first, stop, 1, 0, 0); break;
    case 3: sums_as(b, part, first, stop, 1, 1, 1); break;
    case 4: sums_as(b, part, first, stop, 2, 0, 0); break;
    default: sums_as(b, part, first, stop, 2, 1, 1);
    }
}

/* The totals of the parts, and the gradients of weight and bias. */
static void merge_sums(const Batch *b, int64_t P) {
    const int64_t C = b->C;
    for (int64_t c = 0; c < C; c++) {
        double sum = 0, product = 0;
        for (int64_t p = 0; p < P; p++) {
            sum += b->parts[p * C + c];
            product += b->parts[(P + p) * C + c];
        }
        b->totals[c] = sum;
        b->totals[C + c] = product;
        b->grad_bias[c] = sum;
        b->grad_weight[c] = product * b->numbers[C + c];
    }
}

INLINE void gradient_as(const Batch *b, int64_t first, int64_t stop, int act, int training) {
    const int64_t C = b->C;
    const float *restrict mean = b->numbers, *restrict scale = mean + 2 * C, *restrict shift = mean + 3 * C;
    const float *restrict mean_g = b->means, *restrict slope = b->means + C;
    for (int64_t r = first; r < stop; r++) {
        const float *restrict x = b->x + r * b->x_stride;
        for (int64_t c0 = 0; c0 < C; c0 += CHANNELS) {
            const int64_t n = least(CHANNELS, C - c0);
            _Alignas(32) float out[CHANNELS];
            float added[CHANNELS];
            const float *restrict grad = incoming(b, r, c0, n, added);
            for (int64_t i = 0; i < n; i++) {
                const int64_t c = c0 + i;
                float g = masked(grad[i], activated(x[c], mean[c], scale[c], shift[c], 0, act), act);
                if (training) g = g - mean_g[c] - (x[c] - mean[c]) * slope[c];
                out[i] = scale[c] * g;
            }
            put(b, b->out + r * C + c0, out, n);
        }
    }
}

static void gradient(const Batch *b, int64_t part, int64_t first, int64_t stop) {
    (void)part;
    switch (2 * b->act + (b->training != 0)) {
    case 0: gradient_as(b, first, stop, 0, 0); break;
    case 1: gradient_as(b, first, stop, 0, 1); break;
    case 2: gradient_as(b, first, stop, 1, 0); break;
    case 3: gradient_as(b, first, stop, 1, 1); break;
    case 4: gradient_as(b, first, stop, 2, 0); break;
    default: gradient_as(b, first, stop, 2, 1);
    }
}

/* The work of a thread: takes parts until none is left. */
static void work(void *batch) {
    Batch *b = batch;
    const int64_t P = (b->R + b->rows - 1) / b->rows;
    int64_t part;
    while ((part = __atomic_fetch_add(&b->next, 1, __ATOMIC_RELAXED)) < P)
        b->phase(b, part, part * b->rows, least((part + 1) * b->rows, b->R));
#ifdef __AVX__
    _mm_sfence(); /* before another thread reads them */
#endif
}

static void run(Batch *b, void (*phase)(const Batch *, int64_t, int64_t, int64_t), uint32_t threads, Parallel parallel) {
    b->next = 0;
    b->phase = phase;
    if (parallel && threads > 1) parallel(work, b, threads, 0);
    else work(b);
}

/* The entries. parallel: an OpenMP runtime's GOMP_parallel, or NULL; torch's own pool, as in losses.c. */

/* The totals of x. */
void fasttricks_norm_statistics(Batch *b, uint32_t threads, Parallel parallel) {
    run(b, statistics, threads, parallel);
    merge_statistics(b, (b->R + b->rows - 1) / b->rows);
}

/* y by the numbers. */
void fasttricks_norm_normalise(Batch *b, uint32_t threads, Parallel parallel) { run(b, normalise, threads, parallel); }

void fasttricks_norm_forward(Batch *b, uint32_t threads, Parallel parallel) {
    if (b->training) fasttricks_norm_statistics(b, threads, parallel);
    prepare(b);
    fasttricks_norm_normalise(b, threads, parallel);
}

/* The totals of the gradient, the gradients of weight and bias, and that of the residual. */
void fasttricks_norm_sums(Batch *b, uint32_t threads, Parallel parallel) {
    run(b, sums, threads, parallel);
    merge_sums(b, (b->R + b->rows - 1) / b->rows);
}

/* The gradient of x by the means. */
void fasttricks_norm_gradient(Batch *b, uint32_t threads, Parallel parallel) {
    if (b->grad_residual) { /* its values are added and masked already */
        b->grad = b->grad_residual;
        b->second = NULL;
        b->grad_stride = b->C;
        b->act = 0;
    }
    run(b, gradient, threads, parallel);
}

void fasttricks_norm_backward(Batch *b, uint32_t threads, Parallel parallel) {
    fasttricks_norm_sums(b, threads, parallel);
    if (!b->out) return;
    for (int64_t c = 0; c < b->C; c++) {
        const double rstd = b->numbers[b->C + c];
        b->means[c] = b->training ? b->totals[c] / b->R : 0;
        b->means[b->C + c] = b->training ? b->totals[b->C + c] * rstd * rstd / b->R : 0;
    }
    fasttricks_norm_gradient(b, threads, parallel);
}
