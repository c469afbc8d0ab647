/* What program.c and contests.c share while they write a program. Inside the planner only. */
#ifndef SYSMT_WRITER_H
#define SYSMT_WRITER_H

#include "planes.h"
#include "slot.h"

/* Where the program is written; the first pass only counts entries. */
typedef struct {
    Layer *layer;
    PlaneSet set;
    int64_t entry, step, word; /* next */
    int64_t full_steps;
    bool is_counting;
    int32_t word_sum; /* of the current channel */
} Writer;

/* The four weights of output channel n at (tap, quad). */
static inline void fetch_quad(const Layer *layer, const int8_t *weights, int64_t group, int64_t n,
                              int64_t tap, int64_t quad, int8_t out[QUAD]) {
    const int32_t *channel = layer->channel_of + (group * layer->quads + quad) * QUAD;
    const int8_t *row = weights + (group * layer->shape.n + n) * layer->channels * layer->taps;
    for (int byte = 0; byte < QUAD; byte++)
        out[byte] = channel[byte] < 0 ? 0 : row[channel[byte] * layer->taps + tap];
}

/* A weight as the multiplier takes it where the rule reduces it. */
static inline int used_weight(int weight, const SlotRule *rule) {
    return is_reducible(weight, true, rule) ? reduce_value(weight, true, rule) : weight;
}

static inline int slot_pattern_of(const int8_t weights[QUAD], int byte, int threads) {
    int pattern = 0, first = byte / threads * threads;
    for (int t = 0; t < threads; t++)
        pattern |= (weights[first + t] != 0) << t;
    return pattern;
}

/* Pack word `half` of a quad: four int8, or two of the four int16. */
static inline uint32_t encode(const int16_t values[QUAD], int half, int word_operands) {
    uint32_t word = 0;
    int bits = 32 / word_operands;
    for (int i = 0; i < word_operands; i++)
        word |= ((uint32_t)values[half * word_operands + i] & ((1u << bits) - 1)) << (i * bits);
    return word;
}

/* +128 does not fit eight bits: 127 goes into the word, and what is missing is returned as a second one. */
static inline bool split_overflow(int16_t values[QUAD], int16_t rest[QUAD]) {
    bool any = false;
    for (int byte = 0; byte < QUAD; byte++) {
        rest[byte] = values[byte] == 128;
        values[byte] = (int16_t)(values[byte] - rest[byte]);
        any |= rest[byte] != 0;
    }
    return any;
}

/* ---- contests.c ---- */

/* Whether slots are contests: how many threads are active decides which of two activations meets which of two
 * weights. */
bool makes_contests(const SlotRule *rule, const Format *format);

/* Planes of contests: the activations, exact and reduced, and what those of four weights make of them. */
void choose_contests(Layer *layer);

/* One block of a group: steps at which all channels of a team have four weights come first, the others
 * follow. */
void write_contest_block(Writer *writer, const int8_t *weights, int64_t group, int64_t block);

#endif
