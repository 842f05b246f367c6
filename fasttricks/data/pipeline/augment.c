/* Resize, flip, colour and normalise a decoded region in one pass: uint8 (H, W, 3) in, float32 (S, S, 3) out.
 *
 * A row of the output is made while it lies in the first-level cache: the filter down the columns of the region gives
 * one row of W pixels, the filter along that row gives a pixel, the pixel is rounded to 8 bits and multiplied by the
 * image's 3x4 matrix. Filters, centres and edges are those of PIL's and DALI's resize: a filter widened when the image
 * shrinks (antialias), the outermost pixels repeated. Rounding to 8 bits keeps the values of a resize to uint8, as
 * DALI's own operators, the GPU and the oracle (reference.py) do.
 *
 * Same bits on every machine: each sum has one order, products are rounded before they are added (compile with
 * -ffp-contract=off), nothing depends on the number of threads or the width of the vectors.
 *
 * Called by DALI's operator for compiled callbacks, once a sample, from its thread pool; see fused.py.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __FAST_MATH__
#error "fast math changes the bits"
#endif

#define LANES 8
#define ROUND 12582912.0f /* 1.5 * 2^23: adding and taking it away rounds half to even */

typedef float f8 __attribute__((vector_size(32)));
typedef f8 f8_anywhere __attribute__((aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint8_t u8 __attribute__((vector_size(8)));
typedef u8 u8_anywhere __attribute__((aligned(1), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (i8){__VA_ARGS__})
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    double radius; /* at scale 1, pixels */
    double (*weight)(double);
    int overshoots; /* beyond the range of its inputs */
} Filter;

static double triangle(double x) { return fmax(0.0, 1.0 - fabs(x)); }

static double cubic(double x) { /* Keys, a = -0.5 */
    x = fabs(x);
    return x < 1.0 ? (1.5 * x - 2.5) * x * x + 1.0 : x < 2.0 ? ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 : 0.0;
}

static double sinc(double x) { return x == 0.0 ? 1.0 : sin(M_PI * x) / (M_PI * x); }

static double lanczos3(double x) { return fabs(x) < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0; }

/* The inputs that an output reads along one axis: `taps` weights each, at first[i], first[i] + 1, ... */
typedef struct {
    int taps;
    int *first;
    float *weights; /* (outputs, taps), rows that sum to 1 */
} Axis;

static void *allocate(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes)) {
        fprintf(stderr, "fasttricks augment: out of memory for %zu bytes\n", bytes);
        abort();
    }
    return memory;
}

static Axis make_axis(int inputs, int outputs, Filter filter, int antialias) {
    double scale = (double)inputs / outputs, widen = antialias && scale > 1.0 ? scale : 1.0;
    double radius = filter.radius * widen;
    int span = (int)ceil(2.0 * radius), taps = span < inputs ? span : inputs; /* a filter is 0 at its radius */
    Axis axis = {taps, allocate(outputs * sizeof(int)), allocate((size_t)outputs * taps * sizeof(float))};
    double *row = allocate(taps * sizeof(double));
    for (int i = 0; i < outputs; i++) {
        double center = (i + 0.5) * scale - 0.5, total = 0.0;
        int low = (int)floor(center - radius) + 1;
        int first = low < 0 ? 0 : low;
        first = first > inputs - taps ? inputs - taps : first;
        memset(row, 0, taps * sizeof(double));
        for (int k = 0; k < span; k++) {
            double weight = filter.weight((low + k - center) / widen);
            int at = low + k < 0 ? 0 : low + k >= inputs ? inputs - 1 : low + k; /* the outermost pixel, repeated */
            if (weight != 0.0) row[at - first] += weight;
            total += weight;
        }
        axis.first[i] = first;
        for (int k = 0; k < taps; k++) axis.weights[(size_t)i * taps + k] = (float)(row[k] / total);
    }
    free(row);
    return axis;
}

INLINE f8 load(const uint8_t *x) { /* eight bytes as floats */
#ifdef __AVX2__ /* gcc makes two dozen instructions of the line below */
    return (f8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)x)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const u8_anywhere *)x, i8), f8);
#endif
}

INLINE void transpose(f8 m[LANES]) {
    f8 a[LANES], b[LANES];
    for (int j = 0; j < 4; j++) {
        a[2 * j] = SHUFFLE(m[2 * j], m[2 * j + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[2 * j + 1] = SHUFFLE(m[2 * j], m[2 * j + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int j = 0; j < 2; j++)
        for (int k = 0; k < 2; k++) {
            b[4 * j + 2 * k] = SHUFFLE(a[4 * j + k], a[4 * j + 2 + k], 0, 1, 8, 9, 4, 5, 12, 13);
            b[4 * j + 2 * k + 1] = SHUFFLE(a[4 * j + k], a[4 * j + 2 + k], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; j++) {
        m[j] = SHUFFLE(b[j], b[4 + j], 0, 1, 2, 3, 8, 9, 10, 11);
        m[4 + j] = SHUFFLE(b[j], b[4 + j], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* sums = weights[0] * the first row + weights[1] * the second + ...; at least eight bytes a row */
INLINE void sum_rows(float *sums, const uint8_t *rows, size_t pitch, const float *weights, int taps) {
    for (size_t start = 0; start < pitch; start += LANES) {
        size_t i = start + LANES <= pitch ? start : pitch - LANES; /* the last eight, again in part */
        f8 sum = weights[0] * load(rows + i);
        for (int k = 1; k < taps; k++) sum += weights[k] * load(rows + k * pitch + i);
        *(f8_anywhere *)(sums + i) = sum;
    }
}

/* The filter down the columns, for the eight output rows from y on: sums[i] holds column i of the eight. */
INLINE void filter_down(f8 *sums, float *rows, const uint8_t *image, size_t pitch, const Axis *axis, int y) {
    for (int j = 0; j < LANES; j++) {
        const uint8_t *from = image + pitch * axis->first[y + j];
        const float *weights = axis->weights + (size_t)(y + j) * axis->taps;
        float *row = rows + pitch * j;
        switch (axis->taps) { /* known while compiling, the loop over them goes */
        case 2: sum_rows(row, from, pitch, weights, 2); break;
        case 3: sum_rows(row, from, pitch, weights, 3); break;
        case 4: sum_rows(row, from, pitch, weights, 4); break;
        default: sum_rows(row, from, pitch, weights, axis->taps);
        }
    }
    for (size_t start = 0; start < pitch; start += LANES) {
        size_t i = start + LANES <= pitch ? start : pitch - LANES;
        f8 block[LANES];
        for (int j = 0; j < LANES; j++) block[j] = *(const f8_anywhere *)(rows + pitch * j + i);
        transpose(block);
        memcpy(sums + i, block, sizeof block);
    }
}

INLINE f8 to_8_bits(f8 x, int overshoots) {
    x = (x + ROUND) - ROUND;
    if (overshoots) {
        const f8 high = {255, 255, 255, 255, 255, 255, 255, 255};
        i8 under = x < 0.0f, over = x > high;
        x = (f8)(((i8)high & over) | ((i8)x & ~(under | over)));
    }
    return x;
}

/* The filter along the eight rows in `sums`, rounding, matrix: eight rows of 3 * size floats. */
INLINE void finish_rows(float *out, const f8 *sums, const Axis *axis, int size, const float *matrix, int flip,
                        int overshoots) {
    for (int start = 0; start < size; start += LANES) {
        int x = start + LANES <= size ? start : size - LANES;
        f8 block[3 * LANES];
        for (int j = 0; j < LANES; j++) {
            int from = flip ? size - 1 - (x + j) : x + j;
            const float *weights = axis->weights + (size_t)from * axis->taps;
            const f8 *pixel = sums + 3 * (size_t)axis->first[from];
            f8 red = weights[0] * pixel[0], green = weights[0] * pixel[1], blue = weights[0] * pixel[2];
            for (int k = 1; k < axis->taps; k++) {
                red += weights[k] * pixel[3 * k];
                green += weights[k] * pixel[3 * k + 1];
                blue += weights[k] * pixel[3 * k + 2];
            }
            red = to_8_bits(red, overshoots), green = to_8_bits(green, overshoots), blue = to_8_bits(blue, overshoots);
            for (int c = 0; c < 3; c++) {
                const float *row = matrix + 4 * c;
                block[3 * j + c] = row[0] * red + row[3] + row[1] * green + row[2] * blue;
            }
        }
        for (int part = 0; part < 3; part++) {
            transpose(block + LANES * part);
            for (int j = 0; j < LANES; j++)
                *(f8_anywhere *)(out + 3 * ((size_t)size * j + x) + LANES * part) = block[LANES * part + j];
        }
    }
}

/* size: 8 or more */
static void augment(float *out, int size, const uint8_t *image, int height, int width, const float *matrix, int flip,
                    Filter filter, int antialias) {
    size_t pitch = 3 * (size_t)width;
    uint8_t *widened = NULL;
    if (pitch < LANES) { /* a pixel or two a row: make it rows of eight bytes */
        widened = allocate((size_t)height * LANES);
        memset(widened, 0, (size_t)height * LANES);
        for (int y = 0; y < height; y++) memcpy(widened + (size_t)y * LANES, image + y * pitch, pitch);
        image = widened, pitch = LANES;
    }
    Axis down = make_axis(height, size, filter, antialias), along = make_axis(width, size, filter, antialias);
    f8 *sums = allocate(pitch * sizeof(f8));
    float *rows = allocate(LANES * pitch * sizeof(float));
    for (int start = 0; start < size; start += LANES) {
        int y = start + LANES <= size ? start : size - LANES;
        filter_down(sums, rows, image, pitch, &down, y);
        finish_rows(out + 3 * (size_t)size * y, sums, &along, size, matrix, flip, filter.overshoots);
    }
    free(sums), free(rows), free(widened), free(down.first), free(down.weights), free(along.first), free(along.weights);
}

/* DALI's callbacks. Inputs: image uint8 (H, W, 3), matrix float32 (3, 4), flip float32 () of 0 or 1, and a vector whose
 * length is the output's side. Output: float32 (side, side, 3). */

void fasttricks_shapes(int64_t **outputs, const int32_t *output_dims, int32_t num_outputs, const int64_t **inputs,
                       const int32_t *input_dims, int32_t num_inputs, int32_t samples) {
    (void)output_dims, (void)num_outputs, (void)input_dims;
    for (int32_t i = 0; i < samples; i++) {
        outputs[i][0] = outputs[i][1] = inputs[(num_inputs - 1) * samples + i][0];
        outputs[i][2] = 3;
    }
}

#define CALLBACK(NAME, FILTER, RADIUS, OVERSHOOTS, ANTIALIAS)                                                          \
    void fasttricks_##NAME(void **outputs, const int64_t **output_shapes, const int32_t *output_dims,                  \
                           int32_t num_outputs, const void **inputs, const int64_t **input_shapes,                     \
                           const int32_t *input_dims, int32_t num_inputs) {                                            \
        (void)output_dims, (void)num_outputs, (void)input_dims, (void)num_inputs;                                      \
        augment(outputs[0], (int)output_shapes[0][0], inputs[0], (int)input_shapes[0][0], (int)input_shapes[0][1],     \
                inputs[1], *(const float *)inputs[2] > 0.5f, (Filter){RADIUS, FILTER, OVERSHOOTS}, ANTIALIAS);         \
    }

CALLBACK(linear, triangle, 1.0, 0, 0)
CALLBACK(linear_antialias, triangle, 1.0, 0, 1)
CALLBACK(cubic, cubic, 2.0, 1, 0)
CALLBACK(cubic_antialias, cubic, 2.0, 1, 1)
CALLBACK(lanczos3, lanczos3, 3.0, 1, 0)
CALLBACK(lanczos3_antialias, lanczos3, 3.0, 1, 1)
