/* Gumbel noise as kernels/noise.py defines it: the same integers, and logarithms within float32's last bits. */
#include "vector.h"

static inline __m512 log_ps(__m512 x) { /* x > 0, normal; relative error below 2e-7 */
    __m512 exponent = _mm512_getexp_ps(x), mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
    __mmask16 large = _mm512_cmp_ps_mask(mantissa, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
    mantissa = _mm512_mask_mul_ps(mantissa, large, mantissa, _mm512_set1_ps(0.5f));
    exponent = _mm512_mask_add_ps(exponent, large, exponent, _mm512_set1_ps(1.0f));
    /* log m = 2 atanh s with s = (m - 1) / (m + 1), |s| < 0.172 */
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 s = _mm512_div_ps(_mm512_sub_ps(mantissa, one), _mm512_add_ps(mantissa, one)), z = _mm512_mul_ps(s, s);
    __m512 series = _mm512_set1_ps(2.0f / 9);
    series = _mm512_fmadd_ps(series, z, _mm512_set1_ps(2.0f / 7));
    series = _mm512_fmadd_ps(series, z, _mm512_set1_ps(2.0f / 5));
    series = _mm512_fmadd_ps(series, z, _mm512_set1_ps(2.0f / 3));
    __m512 rest = _mm512_fmadd_ps(_mm512_mul_ps(s, z), series, _mm512_mul_ps(exponent, _mm512_set1_ps(1.42860677e-6f)));
    rest = _mm512_fmadd_ps(s, _mm512_set1_ps(2.0f), rest);
    return _mm512_fmadd_ps(exponent, _mm512_set1_ps(0.693145752f), rest); /* log 2 in two parts */
}

static inline __m512i mix(__m512i h) {
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32((int)0x85EBCA6B));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 13));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32((int)0xC2B2AE35));
    return _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
}

/* out [rows, n], row i from keys[i] alone */
int gumbel(const uint64_t *keys, float *out, int64_t rows, int64_t n, int threads) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 one = _mm512_set1_ps(1.0f), largest = _mm512_set1_ps(1.0f - 0x1p-24f), zero = _mm512_setzero_ps();
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * n >= 1 << 15)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < n; i += 16) {
            __m512i low = _mm512_set1_epi32((int)(uint32_t)keys[row]), high = _mm512_set1_epi32((int)(keys[row] >> 32));
            __m512i token = _mm512_add_epi32(lane, _mm512_set1_epi32((int)i));
            __m512i h = _mm512_add_epi32(_mm512_mullo_epi32(token, _mm512_set1_epi32((int)0x9E3779B1)), low);
            h = mix(_mm512_xor_si512(mix(h), high));
            /* signed, as torch has no unsigned words: negative ones are the upper half */
            __m512 u = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(h), _mm512_set1_ps(0.5f)), _mm512_set1_ps(0x1p-32f));
            u = _mm512_mask_add_ps(u, _mm512_cmp_ps_mask(u, zero, _CMP_LT_OQ), u, one);
            u = _mm512_min_ps(u, largest);
            /* -log1p(-u): the logarithm of the rounded 1 - u, and what the rounding lost */
            __m512 v = _mm512_sub_ps(one, u), lost = _mm512_sub_ps(_mm512_sub_ps(one, v), u);
            __m512 e = _mm512_sub_ps(zero, _mm512_add_ps(log_ps(v), _mm512_div_ps(lost, v)));
            __m512 noise = _mm512_sub_ps(zero, log_ps(e));
            _mm512_mask_storeu_ps(out + row * n + i, n - i >= 16 ? 0xFFFF : (__mmask16)((1 << (n - i)) - 1), noise);
        }
    return 0;
}
