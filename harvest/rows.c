/* Rows of bfloat16 on their way into a block of float16, on a CPU. */

#if !defined(__F16C__) || !defined(__AVX2__)
#error "needs F16C and AVX2"
#endif
#include <immintrin.h>

#include "bf16.h"

/* Row r of x as float16 to row place[r] of data. Returns how many values float16 cannot hold: NaN becomes 0, too large
   becomes 65504 with its sign. d is a multiple of 8. */
int64_t store(const bf16 *x, const int64_t *place, uint16_t *data, int64_t rows, int64_t d) {
    int64_t bad = 0;
#pragma omp parallel for schedule(static) reduction(+ : bad)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *row = x + r * d;
        uint16_t *to = data + place[r] * d, largest = 0;
        for (int64_t j = 0; j < d; j += 8) {
            __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(row + j)));
            __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
            _mm_storeu_si128((__m128i *)(to + j), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
        }
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < d; j++) {
            uint16_t size = to[j] & 0x7fff;
            largest = size > largest ? size : largest;
        }
        if (largest < 0x7c00) continue;
        for (int64_t j = 0; j < d; j++) {
            uint16_t size = to[j] & 0x7fff;
            if (size < 0x7c00) continue;
            to[j] = size > 0x7c00 ? 0 : (uint16_t)((to[j] & 0x8000) | 0x7bff);
            bad++;
        }
    }
    return bad;
}
