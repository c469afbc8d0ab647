#include "ninth_bit.h"
#include "buffers.h"

#include <stdlib.h>
#include <string.h>

bool ninth_bits_make(NinthBits *bits, int64_t capacity) {
    bits->events.capacity = capacity;
    bits->events.list = buffer_take((size_t)capacity * sizeof *bits->events.list);
    return bits->events.list != NULL;
}

void ninth_bits_release(NinthBits *bits) {
    buffer_give(bits->events.list);
    free(bits->corrections);
    free(bits->first);
}

/* Count, or write, every (event, tap) that an output position of the job sees, from next[tile] on. */
static void visit_corrections(const Events *events, const Layer *layer, const Geometry *geometry,
                              int64_t positions, int64_t *next, Correction *out) {
    int64_t count = atomic_load(&events->count);
    for (int64_t i = 0; i < count; i++) {
        const Event *event = &events->list[i];
        for (int64_t tap = 0; tap < layer->taps; tap++) {
            int64_t position = event->position - tap_shift(geometry, &geometry->taps[tap]);
            if (geometry->taps[tap].phase != event->phase || position < 0 || position >= positions)
                continue;
            int64_t at = next[position / TILE]++;
            if (out)
                out[at] = (Correction){(int32_t)i, (int32_t)tap, (int32_t)position};
        }
    }
}

bool ninth_bits_settle(NinthBits *bits, const Layer *layer, const Geometry *geometry, int64_t positions) {
    free(bits->first);
    free(bits->corrections);
    bits->first = NULL;
    bits->corrections = NULL;
    if (!atomic_load(&bits->events.count))
        return true;
    int64_t tiles = (positions + TILE - 1) / TILE, total = 0;
    int64_t *first = bits->first = calloc((size_t)tiles + 1, sizeof *first);
    if (!first)
        return false;
    visit_corrections(&bits->events, layer, geometry, positions, first, NULL);
    for (int64_t tile = 0; tile <= tiles; tile++) {
        int64_t here = first[tile];
        first[tile] = total;
        total += here;
    }
    bits->corrections = malloc((size_t)total * sizeof *bits->corrections + 1);
    if (!bits->corrections) {
        free(bits->first);
        bits->first = NULL;
        return false;
    }
    /* moves every first to the next tile's */
    visit_corrections(&bits->events, layer, geometry, positions, first, bits->corrections);
    memmove(first + 1, first, (size_t)tiles * sizeof *first);
    first[0] = 0;
    return true;
}

bool ninth_bits_of_tile(const NinthBits *bits, const Layer *layer, int64_t group, int64_t tile,
                        int64_t first_channel, int64_t channels, TileCorrections *corrections) {
    memset(corrections->row_of, -1, sizeof corrections->row_of);
    corrections->touched = 0;
    if (!bits->first)
        return true;
    int64_t first = bits->first[tile], end = bits->first[tile + 1];
    for (int64_t i = first; i < end; i++) {
        int16_t *row = &corrections->row_of[bits->corrections[i].position % TILE];
        if (*row < 0)
            *row = (int16_t)corrections->touched++;
    }
    if (!corrections->touched)
        return true;
    if (!corrections->sums)
        corrections->sums = malloc((size_t)(TILE * channels) * sizeof(int32_t));
    if (!corrections->sums)
        return false;
    memset(corrections->sums, 0, (size_t)(corrections->touched * channels) * sizeof(int32_t));
    for (int64_t i = first; i < end; i++) {
        const Correction *correction = &bits->corrections[i];
        const Event *event = &bits->events.list[correction->event];
        const uint32_t *raw =
            layer->raw +
            ((group * layer->taps + correction->tap) * layer->quads + event->quad) * layer->shape.n +
            first_channel;
        layer->ops->correct(raw, channels, event, &layer->rule,
                            corrections->sums + corrections->row_of[correction->position % TILE] * channels);
    }
    return true;
}

void ninth_bits_add(const TileCorrections *corrections, int64_t channels, int64_t first, int count,
                    int32_t acc[BLOCK][TILE]) {
    for (int position = 0; position < TILE; position++)
        if (corrections->row_of[position] >= 0)
            for (int c = 0; c < count; c++)
                acc[c][position] += corrections->sums[corrections->row_of[position] * channels + first + c];
}
