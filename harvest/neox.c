/* What a GPT-NeoX block does between its matrix products, on a CPU. Matrices are bfloat16, one token a row; arithmetic is float32, and every result is rounded once. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifndef __FMA__
#error "needs FMA"
#endif

#include "bf16.h"

/* a = norm(x) * a_weight + a_bias and b likewise: both norms of a block see the same x. */
void norms(const bf16 *x, const bf16 *a_weight, const bf16 *a_bias, const bf16 *b_weight, const bf16 *b_bias, bf16 *a, bf16 *b,
           float eps, int64_t rows, int64_t d) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *row = x + r * d;
        bf16 *to_a = a + r * d, *to_b = b + r * d;
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < d; j++) sum += widen(row[j]);
        float mean = sum / d;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < d; j++) squares += (widen(row[j]) - mean) * (widen(row[j]) - mean);
        float scale = 1 / sqrtf(squares / d + eps);
#pragma omp simd
        for (int64_t j = 0; j < d; j++) {
            float normal = (widen(row[j]) - mean) * scale;
            to_a[j] = narrow(normal * widen(a_weight[j]) + widen(a_bias[j]));
            to_b[j] = narrow(normal * widen(b_weight[j]) + widen(b_bias[j]));
        }
    }
}

/* Adds the bias, turns the first 2 * half values of every query and key, and puts each head's rows together.
   qkv: [sequences, context, heads, 3, size]; out: [3, sequences, heads, context, size]; cos and sin: [context, half]. */
void rotate(const bf16 *qkv, const bf16 *bias, const float *cos, const float *sin, bf16 *out, int64_t sequences,
            int64_t context, int64_t heads, int64_t size, int64_t half) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < sequences * context; r++) {
        int64_t sequence = r / context, position = r % context;
        const float *c = cos + position * half, *s = sin + position * half;
        for (int64_t part = 0; part < 3 * heads; part++) {
            const bf16 *lower = qkv + (r * 3 * heads + part) * size, *upper = lower + half, *b = bias + part * size;
            bf16 *to = out + (((part % 3 * sequences + sequence) * heads + part / 3) * context + position) * size;
            int64_t turned = part % 3 == 2 ? 0 : half;
#pragma omp simd
            for (int64_t j = 0; j < turned; j++) {
                float x = widen(lower[j]) + widen(b[j]), y = widen(upper[j]) + widen(b[half + j]);
                to[j] = narrow(x * c[j] - y * s[j]);
                to[half + j] = narrow(y * c[j] + x * s[j]);
            }
#pragma omp simd
            for (int64_t j = 2 * turned; j < size; j++) to[j] = narrow(widen(lower[j]) + widen(b[j]));
        }
    }
}

/* The normal distribution less one half, to 2e-7: a Chebyshev fit over |x| <= 4.5, outside of which it is constant.
   fmaf, because ISO C does not let the compiler contract a product and a sum: without it gelu takes half as long again. */
static inline float distribution(float x) {
    x = x > 4.5f ? 4.5f : x < -4.5f ? -4.5f : x;
    float s = fmaf(x * x, 2 / 20.25f, -1);
    float sum = fmaf(-0.000312594755f, s, 0.000945954234f);
    sum = fmaf(sum, s, -0.00146300811f);
    sum = fmaf(sum, s, 0.00279443874f);
    sum = fmaf(sum, s, -0.00614592806f);
    sum = fmaf(sum, s, 0.0113784345f);
    sum = fmaf(sum, s, -0.0186220482f);
    sum = fmaf(sum, s, 0.0283029284f);
    sum = fmaf(sum, s, -0.0401818007f);
    sum = fmaf(sum, s, 0.0546991564f);
    sum = fmaf(sum, s, -0.0771901608f);
    sum = fmaf(sum, s, 0.156904966f);
    return sum * x;
}

/* h = gelu(h + bias) in place, the exact one. */
void gelu(bf16 *h, const bf16 *bias, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        bf16 *row = h + r * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            float x = widen(row[j]) + widen(bias[j]);
            row[j] = narrow(x * (0.5f + distribution(x)));
        }
    }
}

/* out = x + a + a_bias + b + b_bias: what attention and MLP, side by side, add to the residual stream. */
void residual(const bf16 *x, const bf16 *a, const bf16 *a_bias, const bf16 *b, const bf16 *b_bias, bf16 *out, int64_t rows,
              int64_t d) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *xr = x + r * d, *ar = a + r * d, *br = b + r * d;
        bf16 *to = out + r * d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++)
            to[j] = narrow(widen(xr[j]) + ((widen(ar[j]) + widen(a_bias[j])) + (widen(br[j]) + widen(b_bias[j]))));
    }
}
