/* CRC-32C by the processor's own instruction. One can begin every cycle but answers after three, so three lanes go at
   once: 19 GB/s where google_crc32c takes 6 of the same 64 MiB, and without Python's lock, which reading threads share. */

#include <stdint.h>
#include <string.h>
#if defined(__SSE4_2__) && defined(__x86_64__)
#include <nmmintrin.h>
#define STEP(crc, word) ((uint32_t)_mm_crc32_u64(crc, word))
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define STEP(crc, word) __crc32cd(crc, word)
#else
#error "this processor has no CRC-32C instruction"
#endif

static uint64_t word(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, 8);
    return value;
}

/* a * b modulo the polynomial, bits reflected: the highest bit is the coefficient of 1. */
static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = b & 1 ? b >> 1 ^ 0x82f63b78 : b >> 1;
    }
    return product;
}

/* x to the power 8 * bytes: what a checksum is multiplied by when so many bytes follow. */
static uint32_t shift(uint64_t bytes) {
    uint32_t power = 1u << 31, square = 1u << 23;
    for (; bytes; bytes >>= 1) {
        if (bytes & 1) power = multiply(power, square);
        square = multiply(square, square);
    }
    return power;
}

uint32_t crc32c(const uint8_t *data, int64_t size) {
    int64_t lane = size / 24 * 8;
    uint32_t a = ~0u, b = 0, c = 0;
    for (int64_t i = 0; i < lane; i += 8) {
        a = STEP(a, word(data + i));
        b = STEP(b, word(data + lane + i));
        c = STEP(c, word(data + 2 * lane + i));
    }
    uint32_t by = shift(lane);
    a = multiply(multiply(a, by) ^ b, by) ^ c;
    for (int64_t i = 3 * lane; i < size; i++) {
        a ^= data[i];
        for (int k = 0; k < 8; k++) a = a & 1 ? a >> 1 ^ 0x82f63b78 : a >> 1;
    }
    return ~a;
}
