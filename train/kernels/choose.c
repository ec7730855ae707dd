/* Which entries of the hidden layer stay, where a kind of sparsity leaves some out. The hidden layer is [features, tokens], and an
 * entry is active, as in kernels.c.
 */

#include <omp.h>
#include <stdint.h>

#include "bf16.h"

/* How many of n numbers have each bit pattern from `first` on, of numbers above 0, whose patterns are in their order. `counts` is
 * [threads, 32768] and zero at first; the caller adds its rows. */
void histogram(const bf16 *z, int32_t *counts, int64_t first, int64_t n) {
#pragma omp parallel
    {
        int32_t *mine = counts + omp_get_thread_num() * 32768;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++)
            if ((int16_t)z[i] >= first) mine[z[i]]++;
    }
}

void equal(const bf16 *z, int64_t least, int64_t *count, int64_t tokens, int64_t features) {
#pragma omp parallel for schedule(static)
    for (int64_t f = 0; f < features; f++) {
        int32_t found = 0;
        for (int64_t t = 0; t < tokens; t++) found += z[f * tokens + t] == (bf16)least;
        count[f] = found;
    }
}

/* What is below `least` becomes 0, and what is equal to it but for the first `room[f]` of a feature. Counts as `activate` does.
 * What is negative here is a NaN or a zero, and stays. */
void keep(bf16 *restrict z, int64_t least, const int64_t *restrict room, int32_t *restrict token_counts,
          int32_t *restrict feature_count, float *restrict feature_total, int64_t tokens, int64_t features) {
#pragma omp parallel
    {
        int32_t *restrict token_count = token_counts + omp_get_thread_num() * tokens;
#pragma omp for schedule(static)
        for (int64_t f = 0; f < features; f++) {
            bf16 *row = z + f * tokens;
            int64_t left = room[f];
            int32_t count = 0;
            float total = 0;
            for (int64_t t = 0; t < tokens; t++) {
                int16_t value = (int16_t)row[t];
                if (value >= 0 && (value < least || (value == least && left-- <= 0))) row[t] = 0;
                if (row[t] == 0) continue;
                int32_t active = (int16_t)row[t] > 0;
                token_count[t] += active;
                count += active;
                total += widen(row[t]);
            }
            feature_count[f] = count;
            feature_total[f] = total;
        }
    }
}

/* How many of each feature's entries lie between its `low` and `high`; all of these bounds are patterns of positive numbers. */
void near(const bf16 *restrict z, const int16_t *restrict low, const int16_t *restrict high, int64_t *restrict count,
          int64_t tokens, int64_t features) {
#pragma omp parallel for schedule(static)
    for (int64_t f = 0; f < features; f++) {
        const int16_t *row = (const int16_t *)z + f * tokens;
        int32_t found = 0;
        for (int64_t t = 0; t < tokens; t++) found += (row[t] > low[f]) & (row[t] < high[f]);
        count[f] = found;
    }
}

/* Lists those, then makes 0 of what is not above `threshold`. Counts as `activate` does; a NaN stays, as in `keep`. */
void jump(bf16 *restrict z, const int16_t *restrict low, const int16_t *restrict threshold, const int16_t *restrict high,
          const int64_t *restrict start, int64_t *restrict token, int32_t *restrict token_counts, int32_t *restrict feature_count,
          float *restrict feature_total, int64_t tokens, int64_t features) {
#pragma omp parallel
    {
        int32_t *restrict token_count = token_counts + omp_get_thread_num() * tokens;
#pragma omp for schedule(static)
        for (int64_t f = 0; f < features; f++) {
            bf16 *row = z + f * tokens;
            int64_t at = start[f];
            int32_t count = 0;
            float total = 0;
            for (int64_t t = 0; t < tokens; t++) {
                int16_t value = (int16_t)row[t];
                if (value == 0) continue;
                if (value > low[f] && value < high[f]) token[at++] = t;
                if (value > 0 && value <= threshold[f]) {
                    row[t] = 0;
                    continue;
                }
                int32_t active = value > 0;
                token_count[t] += active;
                count += active;
                total += widen(row[t]);
            }
            feature_count[f] = count;
            feature_total[f] = total;
        }
    }
}
