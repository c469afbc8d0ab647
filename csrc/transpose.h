/* A 16 x 16 byte transpose, for sources whose channels lie next to each other. Baseline SSE2. */
#ifndef SYSMT_TRANSPOSE_H
#define SYSMT_TRANSPOSE_H

#include <emmintrin.h>

/* 16 vectors of 16 bytes, rows to columns: four rounds of perfect shuffles. */
static inline __attribute__((always_inline)) void transpose_bytes(__m128i rows[16]) {
    _Pragma("GCC unroll 16") for (int round = 0; round < 4; round++) {
        __m128i shuffled[16];
        _Pragma("GCC unroll 16") for (int i = 0; i < 8; i++) {
            shuffled[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
            shuffled[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) rows[i] = shuffled[i];
    }
}

#endif
