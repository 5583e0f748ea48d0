/* The maths of a step in float32, every sum in one fixed order: batch-invariant on any processor.
 *
 * Nothing here depends on how many rows there are, where one lies among them, or who its neighbours are. What C and
 * IEEE 754 leave open is closed: products and sums are contracted only where `fused` says so, nothing is reassociated.
 * Matrices and the KV memory may be bfloat16; they are widened as they are read, which is exact.
 *
 *     y = x W        one chain of additions per element, over the depth from 0 on
 *     norm           16 lanes, element i to lane i % 16, then the lanes from 0 on
 *     attention      64 keys at a time from multiples of 64 on; see attend_row
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

enum { LANES = 16, KEYS = 64, MAX_DIM = 256, TASK_ROWS = 32, WORTH_THREADS = 1 << 14 };
#if defined(__AVX512F__)
enum { ROWS = 12, WIDTH = 2 }; /* sums held in registers: rows x vectors */
#else
enum { ROWS = 4, WIDTH = 1 };
#endif
enum { PANEL = WIDTH * LANES };

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));

static inline __attribute__((always_inline)) Vector fused(Vector a, Vector b, Vector c) { /* a b + c */
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union {
        Vector whole;
        __m256 half[2];
    } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++)
        z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
    return z.whole;
#else
    return a * b + c;
#endif
}

static inline __attribute__((always_inline)) Vector all(float x) {
    return (Vector){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

static inline __attribute__((always_inline)) Vector load(const void *from, int64_t i, int is_half) {
    if (!is_half)
        return *(const Vector *)((const float *)from + i);
    return (Vector)(__builtin_convertvector(*(const Halves *)((const uint16_t *)from + i), Words) << 16);
}

static inline float number(const void *from, int64_t i, int is_half) {
    if (!is_half)
        return ((const float *)from)[i];
    uint32_t word = (uint32_t)((const uint16_t *)from)[i] << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}

/* 2^x; relative error below 3e-7; x is taken to lie within [-126, 126]. */
static inline __attribute__((always_inline)) float power_of_two(float x) {
    x = x < -126.0f ? -126.0f : x;
    x = x > 126.0f ? 126.0f : x;
    float whole = __builtin_rintf(x), part = x - whole, y = 1.52527338e-5f;
    y = y * part + 1.54035304e-4f;
    y = y * part + 1.33335581e-3f;
    y = y * part + 9.61812911e-3f;
    y = y * part + 5.55041087e-2f;
    y = y * part + 2.40226507e-1f;
    y = y * part + 6.93147181e-1f;
    y = y * part + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return y * scale;
}

static inline float total(const float *lanes) {
    float sum = lanes[0];
    for (int i = 1; i < LANES; i++)
        sum += lanes[i];
    return sum;
}

int panel_width(void) { return PANEL; }

/* Rows first .. first + rows - 1 of W, weight [rows, k], to their places in packed [panels, k, PANEL]. */
int pack_panels(const void *weight, void *packed, int64_t first, int64_t rows, int64_t k, int is_half, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = first / PANEL; panel <= (first + rows - 1) / PANEL; panel++)
        for (int64_t i = 0; i < k; i++)
            for (int64_t c = 0; c < PANEL; c++) {
                int64_t row = panel * PANEL + c - first, to = (panel * k + i) * PANEL + c;
                if (row < 0 || row >= rows)
                    continue;
                if (is_half)
                    ((uint16_t *)packed)[to] = ((const uint16_t *)weight)[row * k + i];
                else
                    ((float *)packed)[to] = ((const float *)weight)[row * k + i];
            }
    return 0;
}

/* x: ROWS rows side by side, [k, ROWS]; the first `rows` of them count. */
static inline __attribute__((always_inline)) void multiply(int rows, int is_half, const float *x, const void *w, float *y,
                                                            const float *bias, int64_t k, int64_t n, int64_t columns) {
    Vector sums[ROWS][WIDTH];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < WIDTH; c++)
            sums[r][c] = all(0);
    for (int64_t i = 0; i < k; i++) {
        Vector weight[WIDTH];
        for (int c = 0; c < WIDTH; c++)
            weight[c] = load(w, i * PANEL + c * LANES, is_half);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < WIDTH; c++)
                sums[r][c] = fused(all(x[i * ROWS + r]), weight[c], sums[r][c]);
    }
    for (int r = 0; r < rows; r++) {
        float done[PANEL];
        memcpy(done, sums[r], sizeof done);
        for (int64_t c = 0; c < columns; c++)
            y[r * n + c] = bias ? done[c] + bias[c] : done[c];
    }
}

/* The number of rows is a constant in each call, so that their sums stay in registers. More may be computed than count. */
static inline __attribute__((always_inline)) void multiply_tile(int64_t rows, int is_half, const float *x, const void *w,
                                                                 float *y, const float *bias, int64_t k, int64_t n,
                                                                 int64_t columns) {
    float spare[ROWS * PANEL];
    if (rows == 1) {
        multiply(1, is_half, x, w, y, bias, k, n, columns);
    } else if (rows == ROWS) {
        multiply(ROWS, is_half, x, w, y, bias, k, n, columns);
    } else {
        if (rows <= 4)
            multiply(4, is_half, x, w, spare, bias, k, columns, columns);
        else if (rows <= 8 && ROWS > 8)
            multiply(8, is_half, x, w, spare, bias, k, columns, columns);
        else
            multiply(ROWS, is_half, x, w, spare, bias, k, columns, columns);
        for (int64_t r = 0; r < rows; r++)
            memcpy(y + r * n, spare + r * columns, (size_t)columns * 4);
    }
}

/* y [m, n] = x [m, k] W^T + bias [n] (or null). Returns 0, or -1 without memory. */
int ordered_linear(const float *x, const void *packed, const float *bias, float *y, int64_t m, int64_t n, int64_t k,
                   int is_half, int threads) {
    int64_t panels = (n + PANEL - 1) / PANEL, tiles = (m + ROWS - 1) / ROWS;
    float *beside = malloc((size_t)(tiles * ROWS * k) * 4 + 1);
    if (!beside)
        return -1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t i = 0; i < k; i++)
                for (int64_t r = 0; r < ROWS; r++)
                    beside[(t * k + i) * ROWS + r] = t * ROWS + r < m ? x[(t * ROWS + r) * k + i] : 0;
#pragma omp for schedule(dynamic, 4)
        for (int64_t p = 0; p < panels; p++) {
            const void *w = (const char *)packed + p * k * PANEL * (is_half ? 2 : 4);
            int64_t columns = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
            const float *shift = bias ? bias + p * PANEL : NULL;
            for (int64_t t = 0; t < tiles; t++) {
                int64_t rows = m - t * ROWS < ROWS ? m - t * ROWS : ROWS;
                float *to = y + t * ROWS * n + p * PANEL;
                if (is_half)
                    multiply_tile(rows, 1, beside + t * k * ROWS, w, to, shift, k, n, columns);
                else
                    multiply_tile(rows, 0, beside + t * k * ROWS, w, to, shift, k, n, columns);
            }
        }
    }
    free(beside);
    return 0;
}

/* y [tokens, heads, n] = x / rms(x) * weight [heads, n]; x's tokens lie x_stride apart. */
int ordered_rms_norm(const float *x, const float *weight, float *y, int64_t tokens, int64_t heads, int64_t n,
                     int64_t x_stride, float eps, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (tokens * heads * n >= WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const float *from = x + t * x_stride + h * n;
            float *to = y + (t * heads + h) * n, lanes[LANES] = {0};
            for (int64_t i = 0; i < n; i += LANES)
                for (int64_t j = 0; j < LANES && i + j < n; j++)
                    lanes[j] += from[i + j] * from[i + j];
            float scale = 1.0f / sqrtf(total(lanes) / (float)n + eps);
            for (int64_t i = 0; i < n; i++)
                to[i] = from[i] * scale * weight[h * n + i];
        }
    return 0;
}

/* y [tokens, heads, n] = x cos + swap(x) sin, where swap exchanges the halves; cos, sin [tokens, n]. */
int ordered_rotate(const float *x, const float *cos, const float *sin, float *y, int64_t tokens, int64_t heads, int64_t n,
                   int64_t x_stride, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (tokens * heads * n >= WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const float *from = x + t * x_stride + h * n, *c = cos + t * n, *s = sin + t * n;
            float *to = y + (t * heads + h) * n;
            for (int64_t i = 0; i < n; i++)
                to[i] = from[i] * c[i] + from[i < n / 2 ? i + n / 2 : i - n / 2] * s[i];
        }
    return 0;
}

/* y [tokens, n] = f(x[:, :n]) x[:, n:]; kind 0: silu, 1: gelu, 2: gelu by tanh. */
int ordered_gate(const float *x, float *y, int64_t tokens, int64_t n, int kind, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * n >= WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        const float *left = x + 2 * t * n, *right = left + n;
        float *to = y + t * n;
        if (kind == 0)
            for (int64_t i = 0; i < n; i++)
                to[i] = left[i] / (1.0f + power_of_two(left[i] * -1.44269504f)) * right[i];
        else if (kind == 1)
            for (int64_t i = 0; i < n; i++)
                to[i] = 0.5f * left[i] * (1.0f + erff(left[i] * 0.707106781f)) * right[i];
        else
            for (int64_t i = 0; i < n; i++) {
                float inner = 0.797884561f * (left[i] + 0.044715f * left[i] * left[i] * left[i]);
                to[i] = 0.5f * left[i] * (1.0f + tanhf(inner)) * right[i];
            }
    }
    return 0;
}

typedef struct {
    const float *query; /* [tokens, heads, dim], tokens query_stride apart */
    const void *kv;     /* the layer's keys of block 0; [.., block_size, kv_heads, dim] */
    float *out;         /* [tokens, heads, dim] */
    const int64_t *query_starts, *positions, *block_table; /* [rows + 1], [rows], [rows, table_width] */
    int64_t query_stride, block_stride, value_offset, table_width;
    int64_t rows, heads, kv_heads, dim, block_size, window;
    float scale, soft_cap; /* 0: none */
    int is_half;
} Batch;

typedef struct {
    float key[MAX_DIM][KEYS]; /* transposed: a lane is a key */
    float value[KEYS][MAX_DIM];
    float out[TASK_ROWS][MAX_DIM];
    float sum[TASK_ROWS][LANES], maximum[TASK_ROWS];
} __attribute__((aligned(64))) Work;

static void load_keys(const Batch *b, Work *w, int64_t row, int64_t head, int64_t first, int64_t count, int64_t width) {
    for (int64_t j = 0; j < KEYS; j++) {
        if (j >= count) {
            for (int64_t d = 0; d < b->dim; d++)
                w->key[d][j] = 0;
            continue;
        }
        int64_t position = first + j, block = b->block_table[row * b->table_width + position / b->block_size];
        int64_t at = block * b->block_stride + (position % b->block_size * b->kv_heads + head) * b->dim;
        for (int64_t d = 0; d < b->dim; d++) {
            w->key[d][j] = number(b->kv, at + d, b->is_half);
            w->value[j][d] = number(b->kv, at + b->value_offset + d, b->is_half);
        }
        for (int64_t d = b->dim; d < width; d++)
            w->value[j][d] = 0;
    }
}

/* One query against keys begin .. end - 1 of the 64 at hand: running maximum and sum (online softmax, arXiv:1805.02867).
 * What it does depends on the query's own position alone, not on its task's other queries. */
static void attend_row(const Batch *b, Work *w, int r, const float *query, int64_t begin, int64_t end, int64_t width) {
    Vector scores[KEYS / LANES];
    float p[KEYS];
    for (int c = 0; c < KEYS / LANES; c++)
        scores[c] = all(0);
    for (int64_t d = 0; d < b->dim; d++)
        for (int c = 0; c < KEYS / LANES; c++)
            scores[c] = fused(all(query[d]), load(w->key[d], c * LANES, 0), scores[c]);
    memcpy(p, scores, sizeof p);
    float largest = w->maximum[r], factor = b->scale * 1.44269504f;
    for (int64_t j = 0; j < KEYS; j++)
        p[j] = p[j] * factor;
    if (b->soft_cap > 0) {
        float cap = b->soft_cap * 1.44269504f, twice = 2.0f / b->soft_cap;
        for (int64_t j = 0; j < KEYS; j++) /* cap * tanh(p / cap) */
            p[j] = cap - 2.0f * cap / (power_of_two(p[j] * twice) + 1.0f);
    }
    for (int64_t j = begin; j < end; j++)
        largest = p[j] > largest ? p[j] : largest;
    float decay = power_of_two(w->maximum[r] - largest);
    w->maximum[r] = largest;
    for (int64_t j = 0; j < KEYS; j++) {
        float x = power_of_two(p[j] - largest);
        p[j] = j >= begin && j < end ? x : 0.0f;
    }
    for (int l = 0; l < LANES; l++) {
        float sum = w->sum[r][l] * decay;
        for (int c = 0; c < KEYS / LANES; c++)
            sum += p[c * LANES + l];
        w->sum[r][l] = sum;
    }
    for (int64_t d = 0; d < width; d += LANES) {
        Vector sum = load(w->out[r], d, 0) * all(decay);
        for (int64_t j = begin; j < end; j++)
            sum = fused(all(p[j]), load(w->value[j], d, 0), sum);
        memcpy(w->out[r] + d, &sum, sizeof sum);
    }
}

static void run_task(const Batch *b, Work *w, int64_t row, int64_t head, int64_t first_row) {
    int64_t group = b->heads / b->kv_heads, width = (b->dim + LANES - 1) / LANES * LANES;
    int64_t left = (b->query_starts[row + 1] - b->query_starts[row]) * group - first_row;
    int64_t num_rows = left < TASK_ROWS ? left : TASK_ROWS;
    int64_t first = b->positions[row] + first_row / group, last = b->positions[row] + (first_row + num_rows - 1) / group;
    int64_t start = b->window && first >= b->window ? (first - b->window + 1) / KEYS * KEYS : 0;
    for (int64_t r = 0; r < num_rows; r++) {
        w->maximum[r] = -1e30f;
        memset(w->sum[r], 0, sizeof w->sum[r]);
        memset(w->out[r], 0, sizeof w->out[r]);
    }
    for (int64_t key = start; key <= last; key += KEYS) {
        load_keys(b, w, row, head, key, last + 1 - key < KEYS ? last + 1 - key : KEYS, width);
        for (int64_t r = 0; r < num_rows; r++) {
            int64_t token = (first_row + r) / group, of_group = (first_row + r) % group, position = b->positions[row] + token;
            int64_t oldest = b->window && position >= b->window ? position - b->window + 1 : 0;
            int64_t begin = oldest > key ? oldest - key : 0, end = position + 1 - key < KEYS ? position + 1 - key : KEYS;
            const float *query = b->query + (b->query_starts[row] + token) * b->query_stride;
            if (begin < end)
                attend_row(b, w, (int)r, query + (head * group + of_group) * b->dim, begin, end, width);
        }
    }
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t token = b->query_starts[row] + (first_row + r) / group, of_group = (first_row + r) % group;
        float *out = b->out + (token * b->heads + head * group + of_group) * b->dim, share = 1.0f / total(w->sum[r]);
        for (int64_t d = 0; d < b->dim; d++)
            out[d] = w->out[r][d] * share;
    }
}

/* Causal attention of a ragged batch over paged keys and values; dim is MAX_DIM at most, or nothing is done. */
int ordered_attend(const float *query, const void *kv, float *out, const int64_t *query_starts, const int64_t *positions,
                   const int64_t *block_table, int64_t query_stride, int64_t block_stride, int64_t value_offset,
                   int64_t table_width, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size,
                   int64_t window, float scale, float soft_cap, int is_half, int threads) {
    if (dim > MAX_DIM)
        return -1;
    const Batch batch = {query,       kv,   out,   query_starts, positions, block_table, query_stride, block_stride, value_offset,
                         table_width, rows, heads, kv_heads,     dim,       block_size,  window,       scale,        soft_cap,     is_half};
    int64_t longest = 0;
    for (int64_t row = 0; row < rows; row++) {
        int64_t num = (query_starts[row + 1] - query_starts[row]) * (heads / kv_heads);
        longest = num > longest ? num : longest;
    }
    int64_t parts = (longest + TASK_ROWS - 1) / TASK_ROWS;
#pragma omp parallel num_threads(threads)
    {
        Work work;
        /* Later parts see more keys: largest first, so that threads end together. */
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t part = parts - 1; part >= 0; part--)
            for (int64_t row = 0; row < rows; row++)
                for (int64_t head = 0; head < kv_heads; head++)
                    if (part * TASK_ROWS < (query_starts[row + 1] - query_starts[row]) * (heads / kv_heads))
                        run_task(&batch, &work, row, head, part * TASK_ROWS);
    }
    return 0;
}
