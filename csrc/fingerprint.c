#include "fingerprint.h"
#include "kernels.h"
#include "tuning.h"

#include <string.h>

enum { VECTORS = 8, SECTIONS = 16 };

/* Two words; any compiler makes baseline vector code of it. */
typedef uint64_t Words __attribute__((vector_size(16)));

/* One step for one word. It is a bijection of the state for any word and of the word for any state, so that
 * no single change is ever lost; and it has no multiplication, which only later vector instructions offer. */
#define MIX(state, word) (state ^= (word), state += state << 21, state ^= state >> 27)

static uint64_t fingerprint_section(const unsigned char *data, int64_t bytes) {
    Words lane[VECTORS], word[VECTORS];
    uint64_t all = (uint64_t)bytes;
    for (uint64_t i = 0; i < VECTORS; i++)
        lane[i] = (Words){2 * i + 1, 2 * i + 2} * UINT64_C(0x9E3779B97F4A7C15);
    for (; bytes >= (int64_t)sizeof word; data += sizeof word, bytes -= sizeof word)
        _Pragma("GCC unroll 8") for (int i = 0; i < VECTORS; i++) {
            memcpy(&word[i], data + i * sizeof(Words), sizeof(Words));
            MIX(lane[i], word[i]);
        }
    memset(word, 0, sizeof word);
    memcpy(word, data, (size_t)bytes);
    for (int i = 0; i < VECTORS; i++) {
        MIX(lane[i], word[i]);
        for (int half = 0; half < 2; half++) {
            MIX(all, lane[i][half]);
            all *= UINT64_C(0xD6E8FEB86659FD93);
            all ^= all >> 32;
        }
    }
    return all;
}

typedef struct {
    const unsigned char *data;
    int64_t bytes, section_bytes;
    uint64_t of_section[SECTIONS];
} Sections;

static void run_section(void *context, int64_t index) {
    Sections *sections = context;
    int64_t first = index * sections->section_bytes, left = sections->bytes - first;
    sections->of_section[index] = fingerprint_section(
        sections->data + first, left < sections->section_bytes ? left : sections->section_bytes);
}

uint64_t fingerprint(const unsigned char *data, int64_t bytes, int cpu_threads) {
    if (bytes <= FINGERPRINT_BYTES)
        return fingerprint_section(data, bytes);
    Sections sections = {.data = data, .bytes = bytes, .section_bytes = (bytes / SECTIONS + 64) / 64 * 64};
    int64_t count = (bytes + sections.section_bytes - 1) / sections.section_bytes;
    parallel_for(count, cpu_threads, run_section, &sections);
    return fingerprint_section((const unsigned char *)sections.of_section,
                               count * (int64_t)sizeof(uint64_t)) ^
           (uint64_t)bytes;
}
