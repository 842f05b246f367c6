/* 3x3 convolution of stride 1 and padding 1, float32, channels-last, by Winograd's F(2x2, 3x3): 16 products for 36.
 *
 *     y = A' [ (G w G') . (B' x B) ] A        tiles of 4x4 inputs, 2x2 outputs; the dot is a sum over input channels
 *     gradient of w = G' [ sum over tiles (A g A') . (B' x B) ] G
 *
 * The gradient of x is the convolution of g with the flipped and transposed w. Tiles are taken in blocks whose transforms stay
 * in the second cache; each of the 16 places of a tile is a matrix product of its own. A tile of y is a window of a 2x2 maximum,
 * which can be taken before it is written. C and K are multiples of LANES / 2, and LANES or more.
 */
#include <stdint.h>
#include <stddef.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "fast math loses NaN and infinity"
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define PANEL (2 * LANES) /* channels of a product's columns */
#define ROWS 6            /* tiles of a product's rows */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

typedef struct Job {
    int64_t N, H, W, C, K;                                 /* images, rows, columns, channels of x and of y */
    int64_t stride_out, stride_in, stride_row, stride_col; /* of w, in values; out: along K */
    int64_t TH, TW;                                        /* rows and columns of tiles; half of H and W, up, or down to pool */
    int64_t tiles;                                         /* of a block, a multiple of ROWS */
    int64_t scratch_size;                                  /* values of a thread's scratch */
    const float *x, *w, *grad;
    const float *zeros; /* a pixel of zeros, of the most channels, which stands for those beyond the edge */
    float *y, *grad_w;
    uint8_t *chosen;    /* not NULL: y holds the tiles' maxima, and this the pixel of each, 0 to 3 */
    float *u;           /* 16 C values a channel of K, which is rounded up to PANEL: the weights' transform */
    float *scratch;     /* a thread's transforms */
    float *sums;        /* 16 K values a channel of C, which is rounded up to PANEL, and a thread */
    int32_t flip;       /* of w, for the gradient of x */
    /* of the work */
    int64_t parts, next, joined, summed;
    void (*phase)(struct Job *, int64_t, float *);
} Job;
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

INLINE Vec load(const float *p) { return *(const Vec *)p; }
INLINE void store(float *p, Vec v) { *(Vec *)p = v; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE Vec pick(Ints mask, Vec a, Vec b) { return (Vec)((mask & (Ints)a) | (~mask & (Ints)b)); }
INLINE int64_t panels(int64_t channels) { return (channels + PANEL - 1) / PANEL; }
/* The first `room` values of v, of which there are LANES / 2 or more. */
INLINE void store_some(float *p, Vec v, int64_t room) {
    if (room >= LANES) store(p, v);
    else memcpy(p, &v, sizeof v / 2);
}

/* ---- transforms */
#define INPUT(d, t, o) /* B' d B of 4x4 Vecs */                                                                     \
    UNROLL for (int j = 0; j < 4; j++) {                                                                            \
        t[0][j] = d[0][j] - d[2][j], t[1][j] = d[1][j] + d[2][j];                                                   \
        t[2][j] = d[2][j] - d[1][j], t[3][j] = d[1][j] - d[3][j];                                                   \
    }                                                                                                               \
    UNROLL for (int i = 0; i < 4; i++) {                                                                            \
        o[i][0] = t[i][0] - t[i][2], o[i][1] = t[i][1] + t[i][2];                                                   \
        o[i][2] = t[i][2] - t[i][1], o[i][3] = t[i][1] - t[i][3];                                                   \
    }

/* The addresses of a tile's pixels; its first, at (y, x), and others may be beyond the edge. */
static void find(const float *base, const float *none, int64_t n, int64_t y, int64_t x, int64_t H, int64_t W, int64_t C, int side,
                 const float **found) {
    for (int i = 0; i < side; i++)
        for (int j = 0; j < side; j++) {
            const int64_t r = y + i, c = x + j;
            found[i * side + j] = r >= 0 && r < H && c >= 0 && c < W ? base + ((n * H + r) * W + c) * C : none;
        }
}

/* V[place][tile][width] of tiles first .. first + count; columns from C on are left; zeros from there up to `rows`. */
static void transform_input(const Job *b, int64_t first, int64_t count, int64_t rows, int64_t width, float *restrict v) {
    const int64_t C = b->C, TW = b->TW, TH = b->TH, S = b->tiles * width;
    for (int64_t t = 0; t < count; t++) {
        const int64_t at = first + t, n = at / (TH * TW), ty = at / TW % TH, tx = at % TW;
        const float *p[16];
        find(b->x, b->zeros, n, 2 * ty - 1, 2 * tx - 1, b->H, b->W, C, 4, p);
        float *restrict out = v + t * width;
        for (int64_t at_c = 0; at_c < C; at_c += LANES) {
            const int64_t c = least(at_c, C - LANES); /* half of the last again, where C ends within it */
            Vec d[4][4], m[4][4], o[4][4];
            UNROLL for (int i = 0; i < 16; i++) d[i / 4][i % 4] = load(p[i] + c);
            INPUT(d, m, o)
            UNROLL for (int i = 0; i < 16; i++) store(out + i * S + c, o[i / 4][i % 4]);
        }
    }
    for (int64_t t = count; t < rows; t++)
        for (int i = 0; i < 16; i++) memset(v + i * S + t * width, 0, width * sizeof *v);
}

/* Z[place][tile][K] = A g A' */
static void transform_grad(const Job *b, int64_t first, int64_t count, float *restrict z) {
    const int64_t K = b->K, TW = b->TW, TH = b->TH, S = b->tiles * K;
    for (int64_t t = 0; t < count; t++) {
        const int64_t at = first + t, n = at / (TH * TW), ty = at / TW % TH, tx = at % TW;
        const float *p[4];
        find(b->grad, b->zeros, n, 2 * ty, 2 * tx, b->H, b->W, K, 2, p);
        float *restrict out = z + t * K;
        for (int64_t at_c = 0; at_c < K; at_c += LANES) {
            const int64_t c = least(at_c, K - LANES);
            Vec m[4][2];
            const Vec d00 = load(p[0] + c), d01 = load(p[1] + c), d10 = load(p[2] + c), d11 = load(p[3] + c);
            m[0][0] = d00, m[0][1] = d01, m[1][0] = d00 + d10, m[1][1] = d01 + d11;
            m[2][0] = d00 - d10, m[2][1] = d01 - d11, m[3][0] = -d10, m[3][1] = -d11;
            UNROLL for (int i = 0; i < 4; i++) {
                store(out + (4 * i) * S + c, m[i][0]);
                store(out + (4 * i + 1) * S + c, m[i][0] + m[i][1]);
                store(out + (4 * i + 2) * S + c, m[i][0] - m[i][1]);
                store(out + (4 * i + 3) * S + c, -m[i][1]);
            }
        }
    }
}

/* U[place][panels of K][C][PANEL] = G w G', and zeros beyond K */
static void transform_weight(Job *b, int64_t part, float *scratch) {
    (void)scratch;
    const int64_t C = b->C, P = panels(b->K), S = P * PANEL * C, from = P * part / b->parts, to = P * (part + 1) / b->parts;
    for (int64_t q = from; q < to; q++) {
        const int64_t room = least(PANEL, b->K - q * PANEL);
        for (int64_t c = 0; c < C; c++) {
            float *restrict out = b->u + (q * C + c) * PANEL;
            float w[9][PANEL] = {0};
            for (int i = 0; i < 9; i++) {
                const int k = b->flip ? 8 - i : i;
                const float *p = b->w + c * b->stride_in + (k / 3) * b->stride_row + (k % 3) * b->stride_col + q * PANEL * b->stride_out;
                if (b->stride_out == 1) memcpy(w[i], p, room * sizeof *p);
                else for (int j = 0; j < room; j++) w[i][j] = p[j * b->stride_out];
            }
            for (int j = 0; j < PANEL; j += LANES) {
                Vec t[4][3];
                for (int k = 0; k < 3; k++) {
                    const Vec a = load(w[k] + j), m = load(w[3 + k] + j), e = load(w[6 + k] + j);
                    t[0][k] = a, t[1][k] = (a + m + e) * 0.5f, t[2][k] = (a - m + e) * 0.5f, t[3][k] = e;
                }
                for (int i = 0; i < 4; i++) {
                    store(out + (4 * i) * S + j, t[i][0]);
                    store(out + (4 * i + 1) * S + j, (t[i][0] + t[i][1] + t[i][2]) * 0.5f);
                    store(out + (4 * i + 2) * S + j, (t[i][0] - t[i][1] + t[i][2]) * 0.5f);
                    store(out + (4 * i + 3) * S + j, t[i][2]);
                }
            }
        }
    }
}

/* M[ROWS][PANEL] = V[ROWS][C] U[C][PANEL] */
INLINE void product(const float *restrict v, const float *restrict u, float *restrict m, int64_t C) {
    Vec a[ROWS][2];
    UNROLL for (int r = 0; r < ROWS; r++) a[r][0] = a[r][1] = (Vec){0};
    for (int64_t c = 0; c < C; c++) {
        const Vec u0 = load(u + c * PANEL), u1 = load(u + c * PANEL + LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const float s = v[r * C + c];
            a[r][0] += s * u0, a[r][1] += s * u1;
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) store(m + r * PANEL, a[r][0]), store(m + r * PANEL + LANES, a[r][1]);
}

/* The larger of two, as torch has it: of equals the first, of NaN the last. `which`: the larger one's number. */
INLINE void larger(Vec *best, Ints *which, Vec v, int number) {
    const Ints take = (v > *best) | (v != v);
    *best = pick(take, v, *best), *which = (take & number) | (*which & ~take);
}

/* A block of tiles of y. */
static void convolve(Job *b, int64_t part, float *scratch) {
    const int64_t C = b->C, K = b->K, H = b->H, W = b->W, TW = b->TW, TH = b->TH, total = b->N * TH * TW, T = b->tiles;
    const int64_t first = part * T, count = least(T, total - first), rows = (count + ROWS - 1) / ROWS * ROWS, P = panels(K);
    float *restrict v = scratch, *restrict m = v + 16 * T * C, *restrict none = m + 16 * T * PANEL;
    transform_input(b, first, count, rows, C, v);
    for (int64_t q = 0; q < P; q++) {
        for (int i = 0; i < 16; i++)
            for (int64_t t = 0; t < rows; t += ROWS)
                product(v + (i * T + t) * C, b->u + (i * P + q) * C * PANEL, m + (i * T + t) * PANEL, C);
        for (int64_t t = 0; t < count; t++) {
            const int64_t at = first + t, n = at / (TH * TW), y = at / TW % TH * 2, x = at % TW * 2;
            float *out = b->y + (b->chosen ? at : (n * H + y) * W + x) * K + q * PANEL;
            float *below = y + 1 < H ? out + W * K : none, *aside = x + 1 < W ? out + K : none;
            float *corner = y + 1 < H && x + 1 < W ? below + K : none;
            for (int64_t j = 0; j < least(PANEL, K - q * PANEL); j += LANES) {
                const int64_t room = K - q * PANEL - j;
                Vec d[4][4], s[2][4];
                UNROLL for (int i = 0; i < 16; i++) d[i / 4][i % 4] = load(m + (i * T + t) * PANEL + j);
                UNROLL for (int k = 0; k < 4; k++) {
                    s[0][k] = d[0][k] + d[1][k] + d[2][k];
                    s[1][k] = d[1][k] - d[2][k] - d[3][k];
                }
                const Vec y00 = s[0][0] + s[0][1] + s[0][2], y01 = s[0][1] - s[0][2] - s[0][3];
                const Vec y10 = s[1][0] + s[1][1] + s[1][2], y11 = s[1][1] - s[1][2] - s[1][3];
                if (b->chosen) {
                    Vec best = y00;
                    Ints which = {0};
                    larger(&best, &which, y01, 1), larger(&best, &which, y10, 2), larger(&best, &which, y11, 3);
                    const Bytes bytes = __builtin_convertvector(which, Bytes);
                    store_some(out + j, best, room);
                    memcpy(b->chosen + at * K + q * PANEL + j, &bytes, room >= LANES ? LANES : LANES / 2);
                    continue;
                }
                store_some(out + j, y00, room), store_some(aside + j, y01, room);
                store_some(below + j, y10, room), store_some(corner + j, y11, room);
            }
        }
    }
}

/* The gradient of the convolution's y, into b->y, from that of its maxima: an image. */
static void spread(Job *b, int64_t n, float *scratch) {
    const int64_t K = b->K, H = b->H, W = b->W, TH = b->TH, TW = b->TW;
    float *image = b->y + n * H * W * K;
    (void)scratch;
    for (int64_t ty = 0; ty < TH; ty++) {
        float *row = image + 2 * ty * W * K;
        for (int64_t tx = 0; tx < TW; tx++) {
            const int64_t at = ((n * TH + ty) * TW + tx) * K;
            float *out = row + 2 * tx * K;
            for (int64_t at_k = 0; at_k < K; at_k += LANES) {
                const int64_t k = least(at_k, K - LANES);
                const Vec g = load(b->grad + at + k);
                Bytes bytes;
                memcpy(&bytes, b->chosen + at + k, sizeof bytes);
                const Ints which = __builtin_convertvector(bytes, Ints);
                UNROLL for (int i = 0; i < 4; i++) store(out + (i / 2 * W + i % 2) * K + k, pick(which == i, g, (Vec){0}));
            }
        }
        for (int i = 0; W % 2 && i < 2; i++) memset(row + (i * W + W - 1) * K, 0, K * sizeof *row);
    }
    if (H % 2) memset(image + (H - 1) * W * K, 0, W * K * sizeof *image);
}

/* D[R][2 Vecs] += Z' V over `rows` tiles */
#define OUTER(R)                                                                                                    \
    INLINE void outer##R(const float *restrict z, const float *restrict v, float *restrict d, int64_t rows, int64_t C, int64_t K) { \
        Vec a[R][2];                                                                                                \
        UNROLL for (int r = 0; r < R; r++) a[r][0] = a[r][1] = (Vec){0};                                             \
        for (int64_t t = 0; t < rows; t++) {                                                                        \
            const Vec v0 = load(v + t * C), v1 = load(v + t * C + LANES);                                           \
            UNROLL for (int r = 0; r < R; r++) {                                                                    \
                const float s = z[t * K + r];                                                                       \
                a[r][0] += s * v0, a[r][1] += s * v1;                                                               \
            }                                                                                                       \
        }                                                                                                           \
        UNROLL for (int r = 0; r < R; r++) {                                                                        \
            store(d + r * C, load(d + r * C) + a[r][0]);                                                            \
            store(d + r * C + LANES, load(d + r * C + LANES) + a[r][1]);                                            \
        }                                                                                                           \
    }
OUTER(6)
OUTER(4)
OUTER(2)

/* A part's sums D[place][K][C, up to PANEL] over its blocks of tiles. */
static void differentiate(Job *b, int64_t part, float *scratch) {
    const int64_t C = panels(b->C) * PANEL, K = b->K, total = b->N * b->TH * b->TW, T = b->tiles;
    const int64_t blocks = (total + T - 1) / T, from = blocks * part / b->parts, to = blocks * (part + 1) / b->parts;
    float *restrict v = scratch, *restrict z = v + 16 * T * C, *restrict sums = b->sums + part * 16 * K * C;
    memset(sums, 0, 16 * K * C * sizeof *sums);
    /* no result has the columns from b->C on, but denormals that the memory may hold there would be slow */
    if (C > b->C) memset(v, 0, 16 * T * C * sizeof *v);
    for (int64_t block = from; block < to; block++) {
        const int64_t first = block * T, count = least(T, total - first);
        transform_input(b, first, count, count, C, v);
        transform_grad(b, first, count, z);
        for (int i = 0; i < 16; i++)
            for (int64_t c = 0; c < C; c += PANEL) {
                const float *vi = v + i * T * C + c, *zi = z + i * T * K;
                float *d = sums + i * K * C + c;
                int64_t k = 0;
                for (; k + 6 <= K; k += 6) outer6(zi + k, vi, d + k * C, count, C, K);
                if (k + 4 <= K) outer4(zi + k, vi, d + k * C, count, C, K), k += 4;
                if (k + 2 <= K) outer2(zi + k, vi, d + k * C, count, C, K), k += 2;
            }
    }
}

/* The gradient of w, (K, 3, 3, C) dense, from the parts' sums. */
static void gather(Job *b, int64_t part, float *scratch) {
    const int64_t C = b->C, K = b->K, width = panels(C) * PANEL, S = K * width;
    (void)scratch;
    for (int64_t k = part; k < K; k += b->parts)
        for (int64_t at_c = 0; at_c < C; at_c += LANES) {
            const int64_t c = least(at_c, C - LANES);
            Vec d[4][4], t[3][4];
            for (int i = 0; i < 16; i++) {
                Vec sum = load(b->sums + i * S + k * width + c);
                for (int64_t p = 1; p < b->summed; p++) sum += load(b->sums + (p * 16 + i) * S + k * width + c);
                d[i / 4][i % 4] = sum;
            }
            for (int j = 0; j < 4; j++) {
                const Vec half = (d[1][j] + d[2][j]) * 0.5f;
                t[0][j] = d[0][j] + half, t[1][j] = (d[1][j] - d[2][j]) * 0.5f, t[2][j] = half + d[3][j];
            }
            float *out = b->grad_w + k * 9 * C + c;
            for (int i = 0; i < 3; i++) {
                const Vec half = (t[i][1] + t[i][2]) * 0.5f;
                store(out + (3 * i) * C, t[i][0] + half);
                store(out + (3 * i + 1) * C, (t[i][1] - t[i][2]) * 0.5f);
                store(out + (3 * i + 2) * C, half + t[i][3]);
            }
        }
}

static void work(void *data) {
    Job *b = data;
    float *scratch = b->scratch + __atomic_fetch_add(&b->joined, 1, __ATOMIC_RELAXED) * b->scratch_size;
    int64_t part;
    while ((part = __atomic_fetch_add(&b->next, 1, __ATOMIC_RELAXED)) < b->parts) b->phase(b, part, scratch);
}

static void run(Job *b, void (*phase)(Job *, int64_t, float *), int64_t parts, unsigned threads, Parallel pool) {
    b->phase = phase, b->parts = parts, b->next = 0, b->joined = 0;
    if (threads > 1 && pool && parts > 1) pool(work, b, threads, 0);
    else work(b);
}

static int64_t blocks(const Job *b) {
    return (b->N * b->TH * b->TW + b->tiles - 1) / b->tiles;
}

void fasttricks_winograd_convolve(Job *b, unsigned threads, Parallel pool) {
    run(b, transform_weight, panels(b->K), threads, pool);
    run(b, convolve, blocks(b), threads, pool);
}

void fasttricks_winograd_differentiate(Job *b, unsigned threads, Parallel pool) {
    b->summed = least(blocks(b), threads);
    run(b, differentiate, b->summed, threads, pool);
    run(b, gather, b->K, threads, pool);
}

void fasttricks_winograd_spread(Job *b, unsigned threads, Parallel pool) { run(b, spread, b->N, threads, pool); }
