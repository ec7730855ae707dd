/* Sums over a block of float16 rows in one pass: what writer.block_stats needs for its moments and largest norm. */

#include <stdint.h>
#include <string.h>
#if defined(__F16C__) && defined(__AVX__)
#include <immintrin.h>
#endif

#if !defined(__F16C__) || !defined(__AVX__)
static float widen(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    float value;
    if (rest < 0x400) { /* zero and subnormal numbers, which have no implicit leading one */
        value = (float)rest * 0x1p-24f;
        memcpy(&bits, &value, 4);
    } else {
        bits = rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + (112u << 23);
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}
#endif

/* A row is summed in float32 (at most some thousand values), rows are added up in float64. */
void moments(const uint16_t *data, int64_t rows, int64_t d, double *sum, double *square_sum, float *max_square) {
    double total = 0, squares = 0;
    float largest = 0;
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *row = data + r * d;
        float s = 0, q = 0;
        int64_t j = 0;
#if defined(__F16C__) && defined(__AVX__)
        __m256 s0 = _mm256_setzero_ps(), s1 = s0, q0 = s0, q1 = s0;
        for (; j + 16 <= d; j += 16) {
            __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row + j)));
            __m256 b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row + j + 8)));
            s0 = _mm256_add_ps(s0, a);
            s1 = _mm256_add_ps(s1, b);
            q0 = _mm256_add_ps(q0, _mm256_mul_ps(a, a));
            q1 = _mm256_add_ps(q1, _mm256_mul_ps(b, b));
        }
        float part[8];
        _mm256_storeu_ps(part, _mm256_add_ps(s0, s1));
        for (int k = 0; k < 8; k++) s += part[k];
        _mm256_storeu_ps(part, _mm256_add_ps(q0, q1));
        for (int k = 0; k < 8; k++) q += part[k];
        for (; j < d; j++) {
            float x = _cvtsh_ss(row[j]);
            s += x;
            q += x * x;
        }
#else
        for (; j < d; j++) {
            float x = widen(row[j]);
            s += x;
            q += x * x;
        }
#endif
        total += s;
        squares += q;
        largest = q > largest ? q : largest;
    }
    *sum = total;
    *square_sum = squares;
    *max_square = largest;
}
