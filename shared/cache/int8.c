/* float16 rows <-> int8 rows that end with the two bytes of their scale, on a CPU; int8.py says what they mean. */

#if !defined(__F16C__) || !defined(__AVX2__)
#error "needs F16C and AVX2"
#endif
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static const uint16_t LEAST = 0x0400, MOST = 0x7bff; /* of the scales: the smallest normal float16 and the largest */
enum { AHEAD = 4 }; /* rows that are asked for before their turn: they lie anywhere */

/* y = (x - mean) * inverse of a row; returns the largest |y|. */
static float centred(const uint16_t *x, const float *mean, const float *inverse, float *y, int64_t d) {
    float largest = 0.0f;
    int64_t j = 0;
    for (; j + 8 <= d; j += 8) {
        __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + j)));
        __m256 part = _mm256_mul_ps(_mm256_sub_ps(wide, _mm256_loadu_ps(mean + j)), _mm256_loadu_ps(inverse + j));
        _mm256_storeu_ps(y + j, part);
    }
    for (; j < d; j++) y[j] = (_cvtsh_ss(x[j]) - mean[j]) * inverse[j];
#pragma omp simd reduction(max : largest)
    for (j = 0; j < d; j++) largest = fabsf(y[j]) > largest ? fabsf(y[j]) : largest;
    return largest;
}

/* Rows of x, float16 [rows, d], to rows of out, int8 [rows, d + 2], which may begin where x does. `mean`, `inverse` [2, d] and
   `size` [2] are of both kinds of row; `y` [2, d] is room to work in. Returns how many values had no place. */
int64_t narrow(const uint16_t *x, int8_t *out, const float *mean, const float *inverse, const float *size, float *y, int64_t rows,
               int64_t d) {
    int64_t lost = 0;
    for (int64_t r = 0; r < rows; r++) {
        float largest[2];
        for (int k = 0; k < 2; k++) largest[k] = centred(x + r * d, mean + k * d, inverse + k * d, y + k * d, d);
        int k = largest[1] * size[1] < largest[0] * size[0];
        uint16_t bits = _cvtss_sh(largest[k] / 127.0f, _MM_FROUND_TO_POS_INF);
        bits = bits < LEAST ? LEAST : bits > MOST ? MOST : bits;
        float scale = _cvtsh_ss(bits);
        const float *of = y + k * d;
        int8_t *to = out + r * (d + 2);
        for (int64_t j = 0; j < d; j++) {
            float q = nearbyintf(of[j] / scale);
            to[j] = (int8_t)(q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q);
        }
        if (bits == MOST)
            for (int64_t j = 0; j < d; j++) lost += fabsf(of[j]) > 127.5f * scale;
        bits |= (uint16_t)(k << 15);
        memcpy(to + d, &bits, 2);
    }
    return lost;
}

/* Rows order[i] of stored, int8 [any, d + 2], to rows i of out, float16 [n, d]. */
void widen(const int8_t *stored, const int64_t *order, uint16_t *out, const float *mean, const float *scale, int64_t n, int64_t d) {
    const __m256 most = _mm256_set1_ps(65504.0f), least = _mm256_set1_ps(-65504.0f);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const int8_t *from = stored + order[i] * (d + 2);
        uint16_t bits, *to = out + i * d;
        if (i + AHEAD < n)
            for (int64_t j = 0; j < d + 2; j += 64) __builtin_prefetch(stored + order[i + AHEAD] * (d + 2) + j);
        memcpy(&bits, from + d, 2);
        const float *m = mean + (bits >> 15) * d, *s = scale + (bits >> 15) * d, of_row = _cvtsh_ss(bits & 0x7fff);
        const __m256 factor = _mm256_set1_ps(of_row);
        int64_t j = 0;
        for (; j + 8 <= d; j += 8) {
            __m256 q = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from + j))));
            __m256 x = _mm256_mul_ps(_mm256_mul_ps(q, factor), _mm256_loadu_ps(s + j));
            x = _mm256_min_ps(_mm256_max_ps(_mm256_add_ps(x, _mm256_loadu_ps(m + j)), least), most);
            _mm_storeu_si128((__m128i *)(to + j), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
        }
        for (; j < d; j++) {
            float x = (float)from[j] * of_row * s[j] + m[j];
            x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
            to[j] = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
        }
    }
}
