/* What lies between the matrices, one pass each, bfloat16 in and out, float32 inside: norm, rotation, gate.
 * Last dimensions are multiples of 16 (rotation: of 32). Small inputs stay on the calling thread.
 */
#include "vector.h"
#include <math.h>

enum { WORTH_THREADS = 1 << 15 };

/* y [tokens, heads, n] = x / rms(x) * weight [heads, n]; x's tokens lie x_stride apart. */
int rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, int64_t tokens, int64_t heads, int64_t n,
              int64_t x_stride, float eps, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (tokens * heads * n >= WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const uint16_t *from = x + t * x_stride + h * n;
            uint16_t *to = y + (t * heads + h) * n;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < n; i += 16) {
                __m512 v = load_bf16(from + i);
                sum = _mm512_fmadd_ps(v, v, sum);
            }
            __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)n + eps));
            for (int64_t i = 0; i < n; i += 16)
                store_bf16(to + i, _mm512_mul_ps(_mm512_mul_ps(load_bf16(from + i), scale), load_bf16(weight + h * n + i)));
        }
    return 0;
}

/* y [tokens, heads, n] = x cos + swap(x) sin, where swap exchanges the halves; cos, sin float32 [tokens, n]. */
int rotate(const uint16_t *x, const float *cos, const float *sin, uint16_t *y, int64_t tokens, int64_t heads, int64_t n,
            int64_t x_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * n >= WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const uint16_t *from = x + t * x_stride + h * n;
            uint16_t *to = y + (t * heads + h) * n;
            for (int64_t i = 0; i < n / 2; i += 16) {
                int64_t j = i + n / 2;
                __m512 a = load_bf16(from + i), b = load_bf16(from + j);
                const float *c = cos + t * n, *s = sin + t * n;
                store_bf16(to + i, _mm512_fmadd_ps(b, _mm512_loadu_ps(s + i), _mm512_mul_ps(a, _mm512_loadu_ps(c + i))));
                store_bf16(to + j, _mm512_fmadd_ps(a, _mm512_loadu_ps(s + j), _mm512_mul_ps(b, _mm512_loadu_ps(c + j))));
            }
        }
    return 0;
}

/* y [tokens, n] = silu(x[:, :n]) x[:, n:], x [tokens, 2 n]. */
int gate_silu(const uint16_t *x, uint16_t *y, int64_t tokens, int64_t n, int threads) {
    const __m512 one = _mm512_set1_ps(1.0f), minus_log2e = _mm512_set1_ps(-1.44269504f);
#pragma omp parallel for num_threads(threads) if (tokens * n >= WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < n; i += 16) {
            __m512 gate = load_bf16(x + 2 * t * n + i), up = load_bf16(x + (2 * t + 1) * n + i);
            __m512 denominator = _mm512_add_ps(one, exp2_ps(_mm512_mul_ps(gate, minus_log2e)));
            store_bf16(y + t * n + i, _mm512_mul_ps(_mm512_div_ps(gate, denominator), up));
        }
    return 0;
}
