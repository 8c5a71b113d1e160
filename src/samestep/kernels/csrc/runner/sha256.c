/* SHA-256 (FIPS 180-4). */
#include <stdio.h>
#include <string.h>

#include "runner.h"

static const uint32_t constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
    0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
    0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
    0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
    0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
    0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
    0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
    0xc67178f2};

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* The 16 words of a block, big-endian, and 48 more made of them. */
static void expand(uint32_t w[64], const uint8_t *block) {
    for (int t = 0; t < 16; t++)
        w[t] = (uint32_t)block[4 * t] << 24 | (uint32_t)block[4 * t + 1] << 16 |
               (uint32_t)block[4 * t + 2] << 8 | block[4 * t + 3];
    for (int t = 16; t < 64; t++) {
        uint32_t x = w[t - 15], y = w[t - 2];
        w[t] = w[t - 16] + (rotate(x, 7) ^ rotate(x, 18) ^ x >> 3) + w[t - 7] +
               (rotate(y, 17) ^ rotate(y, 19) ^ y >> 10);
    }
}

static void add_block(uint32_t state[8], const uint8_t *block) {
    uint32_t w[64], s[8];
    expand(w, block);
    memcpy(s, state, sizeof s);
    for (int t = 0; t < 64; t++) {
        uint32_t e = s[4], a = s[0];
        uint32_t first = s[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) +
                         ((e & s[5]) ^ (~e & s[6])) + constants[t] + w[t];
        uint32_t second = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) +
                          ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += first;
        s[0] = first + second;
    }
    for (int j = 0; j < 8; j++) state[j] += s[j];
}

void sha256_begin(Sha256 *digest) {
    *digest = (Sha256){{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f,
                        0x9b05688c, 0x1f83d9ab, 0x5be0cd19},
                       0,
                       {0}};
}

void sha256_add(Sha256 *digest, const void *data, int64_t size) {
    const uint8_t *from = data;
    while (size > 0) {
        int64_t filled = (int64_t)(digest->bytes % 64);
        int64_t n = size < 64 - filled ? size : 64 - filled;
        memcpy(digest->block + filled, from, (size_t)n);
        digest->bytes += (uint64_t)n, from += n, size -= n;
        if (digest->bytes % 64 == 0) add_block(digest->state, digest->block);
    }
}

void sha256_print(Sha256 *digest, const char *name) {
    uint64_t bits = digest->bytes * 8;
    uint8_t length[8], padding[64] = {0x80};
    for (int j = 0; j < 8; j++) length[j] = (uint8_t)(bits >> (56 - 8 * j));
    int64_t filled = (int64_t)(digest->bytes % 64);
    sha256_add(digest, padding, (filled < 56 ? 56 : 120) - filled);
    sha256_add(digest, length, sizeof length);
    printf("%s ", name);
    for (int j = 0; j < 8; j++) printf("%08x", digest->state[j]);
    printf("\n");
}
