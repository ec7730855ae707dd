/* The training step around the matrix products, on a CPU. What each function computes is said in base.py.
 *
 * All of them are bound by memory: each reads and writes its matrices once. bfloat16 is uint16_t here, and the hidden layer
 * is feature-major. An entry of z is active if its sixteen bits, read as a signed integer, are positive; the same test
 * everywhere, so that lists and counts agree even when a NaN goes through (the sum it poisons stops the step).
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "bf16.h"

/* h [features, tokens], as everywhere here. `token_counts` is [threads, tokens] and zero at first; the caller adds its rows. */
void activate(bf16 *restrict h, const float *restrict bias, int32_t *restrict token_counts, int32_t *restrict feature_count,
              float *restrict feature_total, int64_t tokens, int64_t features) {
#pragma omp parallel
    {
        int32_t *restrict token_count = token_counts + omp_get_thread_num() * tokens;
#pragma omp for schedule(static)
        for (int64_t f = 0; f < features; f++) {
            bf16 *row = h + f * tokens;
            int32_t count = 0;
            float total = 0;
            for (int64_t t = 0; t < tokens; t++) {
                float value = widen(row[t]) + bias[f];
                value = value < 0 ? 0 : value;
                bf16 rounded = narrow(value);
                int32_t active = (int16_t)rounded > 0;
                row[t] = rounded;
                token_count[t] += active;
                count += active;
                total += widen(rounded);
            }
            feature_count[f] = count;
            feature_total[f] = total;
        }
    }
}

void mask(bf16 *restrict gz, const bf16 *restrict z, float l1, float *restrict sum, int64_t tokens, int64_t features) {
#pragma omp parallel for schedule(static)
    for (int64_t f = 0; f < features; f++) {
        bf16 *g = gz + f * tokens;
        const bf16 *a = z + f * tokens;
        float total = 0;
        for (int64_t t = 0; t < tokens; t++) {
            bf16 value = (int16_t)a[t] > 0 ? narrow(widen(g[t]) + l1) : 0;
            g[t] = value;
            total += widen(value);
        }
        sum[f] = total;
    }
}

static void list_row(const bf16 *row, int64_t tokens, int32_t *token, float *value) {
    int64_t n = 0, t = 0;
#if defined(__AVX512BW__)
    for (; t + 32 <= tokens; t += 32) {
        __m512i entries = _mm512_loadu_si512((const void *)(row + t));
        uint32_t active = _mm512_cmpgt_epi16_mask(entries, _mm512_setzero_si512());
        for (; active; active &= active - 1, n++) {
            int64_t at = t + __builtin_ctz(active);
            token[n] = (int32_t)at;
            value[n] = widen(row[at]);
        }
    }
#endif
    for (; t < tokens; t++)
        if ((int16_t)row[t] > 0) {
            token[n] = (int32_t)t;
            value[n++] = widen(row[t]);
        }
}

/* First every feature's entries, then from these every token's. `listed` holds the values in the first order. */
void compact(const bf16 *z, const int64_t *row_start, const int64_t *feature_start, int32_t *feature, float *value,
             int32_t *by_feature, int32_t *token, float *listed, int64_t tokens, int64_t features, int64_t parts) {
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t f = 0; f < features; f++) list_row(z + f * tokens, tokens, token + feature_start[f], listed + feature_start[f]);
    /* Each part owns a range of tokens and walks the whole list, so features come out ascending without any locking. */
#pragma omp parallel for schedule(static, 1)
    for (int64_t part = 0; part < parts; part++) {
        int64_t low = tokens * part / parts, high = tokens * (part + 1) / parts;
        int64_t *next = malloc((high - low) * sizeof *next);
        memcpy(next, row_start + low, (high - low) * sizeof *next);
        for (int64_t f = 0; f < features; f++)
            for (int64_t e = feature_start[f]; e < feature_start[f + 1]; e++) {
                if (token[e] < low || token[e] >= high) continue;
                int64_t at = next[token[e] - low]++;
                feature[at] = (int32_t)f;
                value[at] = listed[e];
                by_feature[e] = (int32_t)at;
            }
        free(next);
    }
}

/* sum += a0·r0 + … + a3·r3: four rows at a time, so that the sum is loaded and stored a quarter as often. */
static inline void add_rows(float *restrict sum, const bf16 *r0, const bf16 *r1, const bf16 *r2, const bf16 *r3, float a0,
                            float a1, float a2, float a3, int64_t d) {
    for (int64_t j = 0; j < d; j++) sum[j] += a0 * widen(r0[j]) + a1 * widen(r1[j]) + a2 * widen(r2[j]) + a3 * widen(r3[j]);
}

static inline void add_row(float *restrict sum, const bf16 *row, float a, int64_t d) {
    for (int64_t j = 0; j < d; j++) sum[j] += a * widen(row[j]);
}

static inline void decode(float *restrict sum, const int32_t *feature, const float *value, const bf16 *w_dec, int64_t first,
                          int64_t last, int64_t d) {
    int64_t e = first;
    for (; e + 4 <= last; e += 4)
        add_rows(sum, w_dec + feature[e] * d, w_dec + feature[e + 1] * d, w_dec + feature[e + 2] * d, w_dec + feature[e + 3] * d,
                 value[e], value[e + 1], value[e + 2], value[e + 3], d);
    for (; e < last; e++) add_row(sum, w_dec + feature[e] * d, value[e], d);
}

static inline float dot(const float *a, const bf16 *b, int64_t d) {
    float sum = 0;
    for (int64_t j = 0; j < d; j++) sum += a[j] * widen(b[j]);
    return sum;
}

void residual(const int64_t *row_start, const int32_t *feature, const float *value, const bf16 *w_dec, const float *x,
              const float *bias, float scale, float l1, bf16 *g, float *g_hidden, float *row_square, int64_t tokens,
              int64_t d) {
#pragma omp parallel
    {
        float *r = malloc(d * sizeof *r);
#pragma omp for schedule(dynamic, 8)
        for (int64_t t = 0; t < tokens; t++) {
            int64_t first = row_start[t], last = row_start[t + 1];
            const float *xt = x + t * d;
            for (int64_t j = 0; j < d; j++) r[j] = bias[j] - xt[j];
            decode(r, feature, value, w_dec, first, last, d);
            float square = 0;
            bf16 *gt = g + t * d;
            for (int64_t j = 0; j < d; j++) {
                square += r[j] * r[j];
                gt[j] = narrow(scale * r[j]);
                r[j] = widen(gt[j]);
            }
            row_square[t] = square;
            /* The token's decoder rows are still in this core's cache. */
            for (int64_t e = first; e < last; e++) g_hidden[e] = dot(r, w_dec + feature[e] * d, d) + l1;
        }
        free(r);
    }
}

/* Σ over entries of each row r of rows[r] · others[index]. */
void dots(const int64_t *row_start, const int32_t *index, const bf16 *rows, const bf16 *others, float *out, int64_t n,
          int64_t d) {
#pragma omp parallel
    {
        float *wide = malloc(d * sizeof *wide);
#pragma omp for schedule(dynamic, 8)
        for (int64_t r = 0; r < n; r++) {
            for (int64_t j = 0; j < d; j++) wide[j] = widen(rows[r * d + j]);
            for (int64_t e = row_start[r]; e < row_start[r + 1]; e++) out[e] = dot(wide, others + index[e] * d, d);
        }
        free(wide);
    }
}

/* As `residual`, of the prefixes that end with each of n groups of features: entries of (token, group) begin at row_start. g is
 * [tokens, n, d], the sum of the gradients of the prefixes from that group on; `square` is [tokens, n]. */
void nested_residual(const int64_t *row_start, const int32_t *feature, const float *value, const bf16 *w_dec, const float *x,
                     const float *bias, float scale, float l1, bf16 *g, float *g_hidden, float *square, int64_t tokens,
                     int64_t n, int64_t d) {
#pragma omp parallel
    {
        float *all = malloc(n * d * sizeof *all), *sum = malloc(d * sizeof *sum);  /* of the prefixes, and of their gradients */
#pragma omp for schedule(dynamic, 8)
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t *start = row_start + t * n;
            for (int64_t p = 0; p < n; p++) {
                float *r = all + p * d, total = 0;
                if (p)
                    memcpy(r, r - d, d * sizeof *r);
                else
                    for (int64_t j = 0; j < d; j++) r[j] = bias[j] - x[t * d + j];
                decode(r, feature, value, w_dec, start[p], start[p + 1], d);
                for (int64_t j = 0; j < d; j++) total += r[j] * r[j];
                square[t * n + p] = total;
            }
            memset(sum, 0, d * sizeof *sum);
            for (int64_t p = n - 1; p >= 0; p--) {
                float *r = all + p * d;
                bf16 *gt = g + (t * n + p) * d;
                for (int64_t j = 0; j < d; j++) {
                    sum[j] += scale / n * r[j];
                    gt[j] = narrow(sum[j]);
                    r[j] = widen(gt[j]);
                }
                for (int64_t e = start[p]; e < start[p + 1]; e++) g_hidden[e] = dot(r, w_dec + feature[e] * d, d) + l1;
            }
        }
        free(all);
        free(sum);
    }
}

static void gather(float *restrict sum, const int32_t *entry, const int32_t *token, const float *weight, const bf16 *rows,
                   int64_t n, int64_t d) {
    int64_t k = 0;
    memset(sum, 0, d * sizeof *sum);
    for (; k + 4 <= n; k += 4)
        add_rows(sum, rows + token[k] * d, rows + token[k + 1] * d, rows + token[k + 2] * d, rows + token[k + 3] * d,
                 weight[entry[k]], weight[entry[k + 1]], weight[entry[k + 2]], weight[entry[k + 3]], d);
    for (; k < n; k++) add_row(sum, rows + token[k] * d, weight[entry[k]], d);
}

/* `token` counts the rows of g. */
void weight_grads(const int64_t *feature_start, const int32_t *by_feature, const int32_t *token, const int32_t *row_of_xc,
                  const float *value, const float *g_hidden, const bf16 *g, const bf16 *xc, bf16 *dw_enc, bf16 *dw_dec,
                  float *db_enc, int64_t features, int64_t d) {
#pragma omp parallel
    {
        float *sum = malloc(d * sizeof *sum);
#pragma omp for schedule(dynamic, 32)
        for (int64_t f = 0; f < features; f++) {
            int64_t first = feature_start[f], n = feature_start[f + 1] - first;
            const int32_t *entry = by_feature + first, *from = token + first;
            float bias = 0;
            for (int64_t k = 0; k < n; k++) bias += g_hidden[entry[k]];
            db_enc[f] = bias;
            gather(sum, entry, row_of_xc + first, g_hidden, xc, n, d);
            for (int64_t j = 0; j < d; j++) dw_enc[f * d + j] = narrow(sum[j]);
            gather(sum, entry, from, value, g, n, d);
            for (int64_t j = 0; j < d; j++) dw_dec[f * d + j] = narrow(sum[j]);
        }
        free(sum);
    }
}

void unfold(bf16 *restrict dw_enc, bf16 *restrict dw_dec, float *restrict db_enc, const float *restrict w_enc,
            const float *restrict w_dec, const float *restrict b_enc, const float *restrict norms, int64_t features, int64_t d) {
#pragma omp parallel for schedule(static)
    for (int64_t f = 0; f < features; f++) {
        bf16 *restrict ge = dw_enc + f * d, *restrict gd = dw_dec + f * d;
        const float *restrict we = w_enc + f * d, *restrict wd = w_dec + f * d;
        float n = norms[f], by_norm = b_enc[f] * db_enc[f], along = 0;
        for (int64_t j = 0; j < d; j++) {
            by_norm += we[j] * widen(ge[j]);
            along += wd[j] * widen(gd[j]);
        }
        float inverse = 1 / n, add = (by_norm - along * inverse * inverse) * inverse;
        for (int64_t j = 0; j < d; j++) {
            ge[j] = narrow(n * widen(ge[j]));
            gd[j] = narrow(inverse * widen(gd[j]) + add * wd[j]);
        }
        db_enc[f] *= n;
    }
}

/* A dead feature's moments would decay into subnormal numbers, which cost ten times as much, for good. */
static unsigned flush_subnormals(void) {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}

static void restore_subnormals(unsigned before) {
#if defined(__SSE__)
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

void adam(float *restrict w, float *restrict m, float *restrict v, const bf16 *restrict grad, bf16 *restrict copy,
          int64_t features, int64_t d, int unit_norm, float lr, float clip, float beta1, float beta2,
          float inverse_correction2, float eps) {
#pragma omp parallel
    {
        unsigned mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t f = 0; f < features; f++) {
            const bf16 *restrict g = grad + f * d;
            float *restrict wr = w + f * d, *restrict mr = m + f * d, *restrict vr = v + f * d, square = 0;
            for (int64_t j = 0; j < d; j++) {
                float gj = widen(g[j]) * clip;
                float mj = mr[j] + (1 - beta1) * (gj - mr[j]);
                float vj = beta2 * vr[j] + (1 - beta2) * gj * gj;
                float wj = wr[j] - lr * mj / (sqrtf(vj * inverse_correction2) + eps);
                mr[j] = mj;
                vr[j] = vj;
                wr[j] = wj;
                square += wj * wj;
            }
            if (unit_norm) {
                float inverse = 1 / fmaxf(sqrtf(square), 1e-12f);
                for (int64_t j = 0; j < d; j++) wr[j] *= inverse;
            }
            for (int64_t j = 0; j < d; j++) copy[f * d + j] = narrow(wr[j]);
        }
        restore_subnormals(mode);
    }
}

/* Sum of squares of n numbers, a partial sum for each part of them so that the order is always the same. */
void squares(const bf16 *x, double *partial, int64_t n, int64_t parts) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        float sum = 0;
        for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i++) sum += widen(x[i]) * widen(x[i]);
        partial[part] = sum;
    }
}
