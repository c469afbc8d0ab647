/* A 64-bit fingerprint of a block of memory, at about the speed of reading it.
 *
 * Tells whether weights still hold what they held. Four independent lanes of multiply and rotate, then
 * joined: position matters, so swapped values change it, too.
 */
#ifndef SYSMT_FINGERPRINT_H
#define SYSMT_FINGERPRINT_H

#include <stdint.h>
#include <string.h>

static inline uint64_t fingerprint_mix(uint64_t state, uint64_t word) {
    state = (state ^ word) * UINT64_C(0x9E3779B97F4A7C15);
    return state << 29 | state >> 35;
}

static inline uint64_t fingerprint(const unsigned char *data, int64_t bytes) {
    uint64_t lane[4] = {1, 2, 3, 4}, word[4];
    for (; bytes >= 32; data += 32, bytes -= 32) {
        memcpy(word, data, 32);
        for (int i = 0; i < 4; i++)
            lane[i] = fingerprint_mix(lane[i], word[i]);
    }
    memset(word, 0, 32);
    memcpy(word, data, (size_t)bytes);
    uint64_t all = (uint64_t)bytes;
    for (int i = 0; i < 4; i++)
        all = fingerprint_mix(all, fingerprint_mix(lane[i], word[i]));
    return all;
}

#endif
