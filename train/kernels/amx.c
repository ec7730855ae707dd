/* The dense products of the training step on CPUs with AMX, each with the arithmetic around it done while its result is in cache.
 *
 * The products alone are no faster than oneDNN's in its best layouts, 2.3 to 3.0 TFLOP/s on two cores. What is gained lies
 * around them: weights and hidden layer are only ever read in the order in which they lie (a feature's row), the small
 * matrices are packed once, and relu, mask, counts, sums and rounding cost no pass over memory of their own.
 *
 * The hidden layer is feature-major here, [features, tokens]. All sizes are multiples of 32. What is computed is said in
 * kernels.py; bfloat16 is uint16_t, and an entry is active if its sixteen bits, read as a signed integer, are positive.
 *
 * A product is made of blocks of 32 x 32 results in four tile registers, over at most DEPTH terms at a time: then a panel of b
 * (16 KB) stays in the first-level cache while the panels of a pass by from the second. Both operands are packed so that the
 * tiles follow one another in memory: rows 2 KB or 8 KB apart would fall on the same few cache sets.
 */

#define _GNU_SOURCE
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bf16.h"

enum { SIDE = 32, BLOCK = SIDE * SIDE, DEPTH = 256 };
enum { ENCODE_ROWS = 512, ENCODE_COLS = 128, DECODE_COLS = 256, GRAD_ROWS = 256 };
enum { PACKED_A, PACKED_B, SUMS, HIDDEN, SHARED_1, SHARED_2, SHARED_3, SLOTS };

/* The system must be asked once a process before tile registers may be used (ARCH_REQ_XCOMP_PERM, XTILEDATA). */
int amx_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

static void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = 64;
        tiles.rows[i] = 16;
    }
    _tile_loadconfig(&tiles);
}

/* A thread's own buffers, kept from step to step: fresh memory would be faulted in page by page each time. */
static void *buffer(int slot, size_t bytes) {
    static _Thread_local struct {
        void *data;
        size_t bytes;
    } kept[SLOTS];
    if (kept[slot].bytes < bytes) {
        free(kept[slot].data);
        kept[slot].data = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
        if (!kept[slot].data) abort();
        kept[slot].bytes = bytes;
    }
    return kept[slot].data;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- packing: rows of a as tiles [depth/32][32][32], columns of b as pairs of tiles [depth/32][2][16][16][2] --- */

static void pack_rows(const bf16 *a, int64_t pitch, int64_t rows, int64_t depth, bf16 *out) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < depth; k += SIDE)
            _mm512_store_si512(out + (i / SIDE) * SIDE * depth + k * SIDE + (i % SIDE) * SIDE, _mm512_loadu_si512(a + i * pitch + k));
}

/* The same over any depth, DEPTH by DEPTH. */
static void pack_whole_rows(const bf16 *a, int64_t rows, int64_t depth, bf16 *out) {
    for (int64_t k = 0; k < depth; k += DEPTH) pack_rows(a + k, depth, rows, smaller(DEPTH, depth - k), out + k * rows);
}

/* b [depth, columns]: panel after panel of 32 columns. */
static void pack_columns(const bf16 *b, int64_t pitch, int64_t depth, int64_t columns, bf16 *out) {
    uint16_t low[32], high[32];
    for (int i = 0; i < 16; i++) {
        low[2 * i] = (uint16_t)i, low[2 * i + 1] = (uint16_t)(32 + i);
        high[2 * i] = (uint16_t)(16 + i), high[2 * i + 1] = (uint16_t)(48 + i);
    }
    __m512i first = _mm512_loadu_si512(low), second = _mm512_loadu_si512(high);
    for (int64_t k = 0; k < depth; k += 2)
        for (int64_t j = 0; j < columns; j += SIDE) {
            __m512i even = _mm512_loadu_si512(b + k * pitch + j), odd = _mm512_loadu_si512(b + (k + 1) * pitch + j);
            bf16 *o = out + j * depth + (k / SIDE) * BLOCK + (k % SIDE) / 2 * 32;
            _mm512_store_si512(o, _mm512_permutex2var_epi16(even, first, odd));
            _mm512_store_si512(o + BLOCK / 2, _mm512_permutex2var_epi16(even, second, odd));
        }
}

/* The same from b transposed, [32 columns, depth]. */
static void pack_transposed(const bf16 *b, int64_t pitch, int64_t depth, bf16 *out) {
    for (int64_t k = 0; k < depth; k += 2)
        for (int64_t j = 0; j < SIDE; j++)
            memcpy(out + (k / SIDE) * BLOCK + (j / 16) * (BLOCK / 2) + (k % SIDE) / 2 * 32 + (j % 16) * 2, b + j * pitch + k, 4);
}

/* out [32, 32] = in [32 rows, pitch apart] transposed: five rounds in which pairs of rows exchange ever larger parts. */
static void transpose(const bf16 *in, int64_t pitch, bf16 *out) {
    __m512i rows[SIDE];
    for (int i = 0; i < SIDE; i++) rows[i] = _mm512_loadu_si512(in + i * pitch);
    for (int step = 1; step < SIDE; step *= 2) {
        uint16_t upper[32], lower[32];
        for (int j = 0; j < SIDE; j++) {
            upper[j] = (uint16_t)(j & step ? 32 + j - step : j);
            lower[j] = (uint16_t)(j & step ? 32 + j : j + step);
        }
        __m512i first = _mm512_loadu_si512(upper), second = _mm512_loadu_si512(lower);
        for (int i = 0; i < SIDE; i++) {
            if (i & step) continue;
            __m512i a = rows[i], b = rows[i + step];
            rows[i] = _mm512_permutex2var_epi16(a, first, b);
            rows[i + step] = _mm512_permutex2var_epi16(a, second, b);
        }
    }
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(out + i * SIDE, rows[i]);
}

/* The rows of w [depth, rows] transposed, DEPTH by DEPTH, by all threads. */
static void pack_all_rows_of_transpose(const bf16 *w, int64_t rows, int64_t depth, bf16 *out) {
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < depth; k += SIDE) {
        int64_t first = k / DEPTH * DEPTH, block_depth = smaller(DEPTH, depth - first);
        for (int64_t i = 0; i < rows; i += SIDE)
            transpose(w + k * rows + i, rows, out + first * rows + i * block_depth + (k - first) * SIDE);
    }
}

/* Whole matrices, by all threads. Columns lie panel by panel (each over the whole depth), or DEPTH by DEPTH. */
static void pack_all_transposed(const bf16 *b, int64_t depth, int64_t columns, bf16 *out) {
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < columns; j += SIDE) pack_transposed(b + j * depth, depth, depth, out + j * depth);
}

static void pack_all_columns(const bf16 *b, int64_t depth, int64_t columns, bf16 *out) {
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < depth; k += DEPTH)
        pack_columns(b + k * columns, columns, smaller(DEPTH, depth - k), columns, out + k * columns);
}

/* --- products --- */

/* c [32, 32], four tiles one after the other, = or += a · b over `depth`. `next` is fetched meanwhile: b's next panel. */
static inline void block(const bf16 *a, const bf16 *b, int64_t depth, float *c, int first, const char *next, int64_t next_bytes) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + 256, 64);
        _tile_loadd(2, c + 512, 64);
        _tile_loadd(3, c + 768, 64);
    }
    for (int64_t i = 0; i < next_bytes; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
    for (int64_t k = 0; k < depth * SIDE; k += BLOCK) {
        _tile_loadd(4, a + k, 64);
        _tile_loadd(6, b + k, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + k + BLOCK / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + k + BLOCK / 2, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
}

/* c = or += packed a [rows, depth] · packed b [depth, columns]; c is blocks, columns outermost. b's panels lie `pitch` apart. */
static void multiply(const bf16 *a, const bf16 *b, int64_t pitch, int64_t rows, int64_t columns, int64_t depth, float *c, int first) {
    int64_t share = (depth * SIDE * (int64_t)sizeof *b / (rows / SIDE) + 63) & ~(int64_t)63;
    for (int64_t j = 0; j < columns / SIDE; j++)
        for (int64_t i = 0; i < rows / SIDE; i++)
            block(a + i * SIDE * depth, b + j * pitch, depth, c + (j * (rows / SIDE) + i) * BLOCK, first,
                  (const char *)(b + (j + 1) * pitch) + i * share, share);
}

/* The same over any depth: a from pack_whole_rows, b from pack_all_transposed. */
static void multiply_whole(const bf16 *a, const bf16 *b, int64_t rows, int64_t columns, int64_t depth, float *c) {
    for (int64_t j = 0; j < columns; j += SIDE)
        for (int64_t k = 0; k < depth; k += DEPTH)
            multiply(a + k * rows, b + j * depth + k * SIDE, DEPTH * SIDE, rows, SIDE, smaller(DEPTH, depth - k), c + j * rows,
                     k == 0);
}

/* Columns 0–15 and 16–31 of a row of a block. */
static inline const float *row_of(const float *c, int64_t rows, int64_t i, int64_t j) {
    return c + (j / SIDE * (rows / SIDE) + i / SIDE) * BLOCK + (i % SIDE) / 16 * 512 + (i % 16) * 16;
}

static inline __m512i narrow_pair(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

static inline __m512 widen_first(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16)); }

static inline __m512 widen_second(__m512i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16));
}

static inline __m512 sum_pair(__m512i x) { return _mm512_add_ps(widen_first(x), widen_second(x)); }

/* --- z = relu(w · xᵀ + bias), and its counts --- */

typedef struct {
    const float *bias;
    bf16 *z;
    int32_t *feature_count, *token_count;
    int64_t tokens;
} Hidden;

static double store_hidden(const Hidden *h, const float *c, int64_t rows, int64_t columns, int64_t f0, int64_t t0) {
    double total = 0;
    for (int64_t i = 0; i < rows; i++) {
        __m512 bias = _mm512_set1_ps(h->bias[f0 + i]), zero = _mm512_setzero_ps(), sum = zero;
        int32_t count = 0;
        for (int64_t j = 0; j < columns; j += SIDE) {
            const float *from = row_of(c, rows, i, j);
            /* the second operand of a maximum wins if there is a NaN: it must go through */
            __m512i value = narrow_pair(_mm512_max_ps(zero, _mm512_add_ps(_mm512_load_ps(from), bias)),
                                        _mm512_max_ps(zero, _mm512_add_ps(_mm512_load_ps(from + 256), bias)));
            _mm512_stream_si512((__m512i *)(h->z + (f0 + i) * h->tokens + t0 + j), value);
            uint32_t active = _mm512_cmpgt_epi16_mask(value, _mm512_setzero_si512());
            sum = _mm512_add_ps(sum, sum_pair(value));
            if (!active) continue;
            count += _mm_popcnt_u32(active);
            int32_t *counts = h->token_count + t0 + j;
            __m512i one = _mm512_set1_epi32(1), a = _mm512_loadu_si512(counts), b = _mm512_loadu_si512(counts + 16);
            _mm512_storeu_si512(counts, _mm512_mask_add_epi32(a, (__mmask16)active, a, one));
            _mm512_storeu_si512(counts + 16, _mm512_mask_add_epi32(b, (__mmask16)(active >> 16), b, one));
        }
        h->feature_count[f0 + i] += count;
        total += _mm512_reduce_add_ps(sum);
    }
    return total;
}

/* `token_counts` is [threads, tokens] and `totals` [threads], all zero at first, as is feature_count. */
void amx_encode(const bf16 *w, const bf16 *x, const float *bias, bf16 *z, int32_t *feature_count, int32_t *token_counts,
                double *totals, int64_t tokens, int64_t features, int64_t d) {
    bf16 *packed_x = buffer(SHARED_1, (size_t)(tokens * d) * sizeof *x);
    pack_all_transposed(x, d, tokens, packed_x);
#pragma omp parallel
    {
        int thread = omp_get_thread_num();
        configure_tiles();
        bf16 *a = buffer(PACKED_A, (size_t)(ENCODE_ROWS * d) * sizeof *a);
        float *c = buffer(SUMS, ENCODE_ROWS * ENCODE_COLS * sizeof *c);
        Hidden hidden = {bias, z, feature_count, token_counts + thread * tokens, tokens};
        double total = 0;
#pragma omp for schedule(static)
        for (int64_t f = 0; f < features; f += ENCODE_ROWS) {
            int64_t rows = smaller(ENCODE_ROWS, features - f);
            pack_whole_rows(w + f * d, rows, d, a);
            for (int64_t t = 0; t < tokens; t += ENCODE_COLS) {
                int64_t columns = smaller(ENCODE_COLS, tokens - t);
                multiply_whole(a, packed_x + t * d, rows, columns, d, c);
                total += store_hidden(&hidden, c, rows, columns, f, t);
            }
        }
        _mm_sfence();
        totals[thread] = total;
        _tile_release();
    }
}

/* --- g = scale · (zᵀ · w + bias − x), and Σ (…)² of every token --- */

void amx_decode(const bf16 *w, const bf16 *z, const float *x, const float *bias, float scale, bf16 *g, float *row_square,
                int64_t tokens, int64_t features, int64_t d) {
    bf16 *packed_w = buffer(SHARED_1, (size_t)(features * d) * sizeof *w);
    pack_all_rows_of_transpose(w, d, features, packed_w);
#pragma omp parallel
    {
        configure_tiles();
        bf16 *b = buffer(PACKED_B, DEPTH * DECODE_COLS * sizeof *b);
        float *c = buffer(SUMS, (size_t)(d * DECODE_COLS) * sizeof *c);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t += DECODE_COLS) {
            int64_t columns = smaller(DECODE_COLS, tokens - t);
            for (int64_t f = 0; f < features; f += DEPTH) {
                int64_t depth = smaller(DEPTH, features - f);
                pack_columns(z + f * tokens + t, tokens, depth, columns, b);
                multiply(packed_w + f * d, b, SIDE * depth, d, columns, depth, c, f == 0);
            }
            for (int64_t i = 0; i < columns; i++) {
                const float *column = c + i / SIDE * (d / SIDE) * BLOCK + (i % SIDE) / 16 * 256 + i % 16, *xt = x + (t + i) * d;
                bf16 *gt = g + (t + i) * d;
                float square = 0, r[16];
                for (int64_t j = 0; j < d; j += 16) {
                    for (int k = 0; k < 16; k++) r[k] = column[j / 16 * 512 + k * 16] + bias[j + k] - xt[j + k];
                    for (int k = 0; k < 16; k++) square += r[k] * r[k];
                    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(r), _mm512_set1_ps(scale));
                    _mm256_storeu_si256((__m256i *)(gt + j), (__m256i)_mm512_cvtneps_pbh(scaled));
                }
                row_square[t + i] = square;
            }
        }
        _tile_release();
    }
}

/* --- both weight gradients --- */

/* gz = (c + l1) where z is active, rounded and packed as rows for the product that follows; returns nothing but row sums. */
static void store_masked(const float *c, const bf16 *z, float l1, bf16 *packed, float *db, int64_t rows, int64_t tokens, int64_t t0,
                         int64_t columns) {
    __m512 add = _mm512_set1_ps(l1);
    for (int64_t i = 0; i < rows; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < columns; j += SIDE) {
            const float *from = row_of(c, rows, i, j);
            int64_t t = t0 + j, k = t / DEPTH * DEPTH, depth = smaller(DEPTH, tokens - k);
            __mmask32 active = _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(z + i * tokens + t), _mm512_setzero_si512());
            __m512i value = narrow_pair(_mm512_add_ps(_mm512_load_ps(from), add), _mm512_add_ps(_mm512_load_ps(from + 256), add));
            value = _mm512_maskz_mov_epi16(active, value);
            sum = _mm512_add_ps(sum, sum_pair(value));
            _mm512_store_si512(packed + k * rows + i / SIDE * SIDE * depth + (t - k) * SIDE + i % SIDE * SIDE, value);
        }
        db[i] += _mm512_reduce_add_ps(sum);
    }
}

static void store_rows(const float *c, bf16 *out, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j += SIDE) {
            const float *from = row_of(c, rows, i, j);
            _mm512_storeu_si512(out + i * columns + j, narrow_pair(_mm512_load_ps(from), _mm512_load_ps(from + 256)));
        }
}

/* gz never leaves a thread's cache, some hundred features at a time. */
void amx_weight_grads(const bf16 *w_dec, const bf16 *z, const bf16 *g, const bf16 *x, float l1, bf16 *dw_enc, bf16 *dw_dec,
                      float *db, int64_t tokens, int64_t features, int64_t d) {
    size_t small = (size_t)(tokens * d) * sizeof *g;
    bf16 *g_transposed = buffer(SHARED_1, small), *g_columns = buffer(SHARED_2, small), *x_columns = buffer(SHARED_3, small);
    pack_all_transposed(g, d, tokens, g_transposed);
    pack_all_columns(g, tokens, d, g_columns);
    pack_all_columns(x, tokens, d, x_columns);
#pragma omp parallel
    {
        configure_tiles();
        bf16 *a = buffer(PACKED_A, (size_t)(GRAD_ROWS * (d > DEPTH ? d : DEPTH)) * sizeof *a);
        bf16 *gz = buffer(HIDDEN, (size_t)(GRAD_ROWS * tokens) * sizeof *gz);
        float *c = buffer(SUMS, (size_t)(GRAD_ROWS * (d > ENCODE_COLS ? d : ENCODE_COLS)) * sizeof *c);
#pragma omp for schedule(static)
        for (int64_t f = 0; f < features; f += GRAD_ROWS) {
            int64_t rows = smaller(GRAD_ROWS, features - f);
            memset(db + f, 0, (size_t)rows * sizeof *db);
            pack_whole_rows(w_dec + f * d, rows, d, a);
            for (int64_t t = 0; t < tokens; t += ENCODE_COLS) {
                int64_t columns = smaller(ENCODE_COLS, tokens - t);
                multiply_whole(a, g_transposed + t * d, rows, columns, d, c);
                store_masked(c, z + f * tokens, l1, gz, db + f, rows, tokens, t, columns);
            }
            for (int64_t t = 0; t < tokens; t += DEPTH) {
                int64_t depth = smaller(DEPTH, tokens - t);
                multiply(gz + t * rows, x_columns + t * d, SIDE * depth, rows, d, depth, c, t == 0);
            }
            store_rows(c, dw_enc + f * d, rows, d);
            for (int64_t t = 0; t < tokens; t += DEPTH) {
                int64_t depth = smaller(DEPTH, tokens - t);
                pack_rows(z + f * tokens + t, tokens, rows, depth, a);
                multiply(a, g_columns + t * d, SIDE * depth, rows, d, depth, c, t == 0);
            }
            store_rows(c, dw_dec + f * d, rows, d);
        }
        _tile_release();
    }
}
