/* Slots of four threads as contests: one product, whose operands are chosen by how many threads are active.
 * Two activations (exact, reduced) and two weights serve every weight pattern; see README.md. */
#include "writer.h"

#include <string.h>

bool makes_contests(const SlotRule *rule, const Format *format) {
    /* A bias is taken off by the sum of the words, which contests do not know beforehand. */
    return rule->threads == 4 && rule->skips_zeros && !rule->reduces_weight &&
           !bias_of(format, rule->is_signed);
}

/* Which flags an activation pattern raises. */
static uint32_t raised_flags(int activations) {
    uint32_t flags = 0;
    for (int weights = 0; weights < PATTERNS; weights++) {
        int active = __builtin_popcount((unsigned)(activations & weights));
        flags |= (uint32_t)((active >= 2 ? TWO_FLAG[weights] : 0) | (active >= 3 ? THREE_FLAG[weights] : 0));
    }
    return flags;
}

void choose_contests(Layer *layer) {
    const SlotRule *rule = &layer->rule;
    for (int pattern = 0; pattern < PATTERNS; pattern++) {
        layer->flags_of[pattern] = raised_flags(pattern);
        for (int byte = 0; byte < QUAD; byte++) {
            layer->planes[0].code[pattern][byte] = pattern >> byte & 1 ? EXACT : ZERO;
            layer->planes[1].code[pattern][byte] = pattern >> byte & 1 ? REDUCED : ZERO;
        }
    }
    layer->form = FORM_MIXED;
    layer->dense_plane[0] = 2;
    layer->dense_plane[1] = 3;
    layer->planes[2] = make_plane(rule, rule->needs_both ? WITH_EITHER_SPARED : WITH_EITHER, 15);
    layer->planes[3] = make_plane(rule, WITH_EITHER, 15);
    layer->plane_count = rule->needs_both ? 4 : 3;
}

/* The slots of a team at one (tap, quad). */
typedef struct {
    int8_t weights[TEAM][QUAD];
    int channels;
    bool is_full, is_empty;
} Slots;

static Slots fetch_slots(const Layer *layer, const int8_t *weights, int64_t group, int64_t first, int64_t tap,
                         int64_t quad) {
    int64_t left = layer->shape.n - first;
    Slots slots = {.channels = left < TEAM ? (int)left : TEAM, .is_full = true, .is_empty = true};
    for (int c = 0; c < slots.channels; c++) {
        int8_t *w = slots.weights[c];
        fetch_quad(layer, weights, group, first + c, tap, quad, w);
        slots.is_full &= w[0] && w[1] && w[2] && w[3];
        slots.is_empty &= !w[0] && !w[1] && !w[2] && !w[3];
    }
    return slots;
}

/* Whether a reduced weight is +128 where words hold no ninth bit. */
static bool has_overflow(const Layer *layer, const Slots *slots) {
    bool any = false;
    for (int c = 0; c < slots->channels && !layer->format.has_ninth_bit; c++)
        for (int byte = 0; byte < QUAD; byte++)
            any |= used_weight(slots->weights[c][byte], &layer->rule) == 128;
    return any;
}

/* A flag as the path's contests read it. */
static uint32_t flag_word(const Layer *layer, uint16_t flag) {
    return layer->format.flags == FLAG_AS_BIT ? in_both_halves(flag) : shift_of_flag(flag);
}

/* Both weights of each channel side by side, and what decides between them; `rest`: instead, what the words
 * of reduced weights lack (see split_overflow). */
static void write_contests(Writer *writer, int64_t quad_step, const Slots *slots, int kind, bool rest) {
    Layer *layer = writer->layer;
    const SlotRule *rule = &layer->rule;
    int halves = QUAD / layer->format.word_operands;
    int words = form_words(kind == FULL ? FORM_FULL : FORM_MIXED, rule->needs_both);
    for (int half = 0; half < halves; half++) {
        uint32_t *to = layer->dense + writer->word;
        for (int c = 0; c < slots->channels; c++) {
            const int8_t *w = slots->weights[c];
            int16_t exact[QUAD] = {0}, reduced[QUAD], lacking[QUAD] = {0}, mask[QUAD];
            for (int byte = 0; byte < QUAD; byte++) {
                exact[byte] = rest ? 0 : w[byte];
                reduced[byte] = (int16_t)used_weight(w[byte], rule);
                mask[byte] = is_reducible(w[byte], true, rule) ? -1 : 0;
            }
            if (!layer->format.has_ninth_bit)
                split_overflow(reduced, lacking);
            if (writer->is_counting)
                continue;
            int pattern = slot_pattern_of(w, 0, QUAD);
            to[c] = encode(exact, half, layer->format.word_operands);
            to[TEAM + c] = encode(rest ? lacking : reduced, half, layer->format.word_operands);
            uint16_t two = TWO_FLAG[pattern], three = THREE_FLAG[pattern];
            if (kind == MIXED) {
                to[2 * TEAM + c] = flag_word(layer, two);
                to[3 * TEAM + c] = flag_word(layer, three);
            }
            if (rule->needs_both)
                to[(words - 1) * TEAM + c] = encode(mask, half, layer->format.word_operands);
        }
        if (!writer->is_counting)
            layer->order[writer->step] = (uint32_t)(quad_step * halves + half);
        writer->step++;
        writer->full_steps += kind == FULL;
        writer->word += words * TEAM;
    }
}

/* One chunk's steps of one kind, for the channels from `first` on. */
static void write_stream(Writer *writer, const int8_t *weights, int64_t group, int64_t first, int64_t chunk,
                         int kind) {
    Layer *layer = writer->layer;
    int64_t step = chunk * layer->chunk_quads * layer->taps;
    for (int64_t tap = 0; tap < layer->taps; tap++)
        for (int64_t quad = 0; quad < quads_of_chunk(layer, chunk); quad++, step++) {
            Slots slots = fetch_slots(layer, weights, group, first, tap, chunk * layer->chunk_quads + quad);
            if (!slots.is_empty && slots.is_full == (kind == FULL))
                write_contests(writer, step, &slots, kind, false);
            if (kind == MIXED && has_overflow(layer, &slots))
                write_contests(writer, step, &slots, MIXED, true);
        }
}

void write_contest_block(Writer *writer, const int8_t *weights, int64_t group, int64_t block) {
    Layer *layer = writer->layer;
    Start *start = layer->starts + (group * layer->blocks + block) * layer->chunks * TEAMS * STREAMS;
    for (int64_t chunk = 0; chunk < layer->chunks; chunk++)
        for (int team = 0; team < TEAMS; team++)
            for (int kind = 0; kind < STREAMS; kind++) {
                if (!writer->is_counting)
                    *start++ = (Start){writer->step, writer->word};
                int64_t first = block * BLOCK + team * TEAM;
                if (first < layer->shape.n)
                    write_stream(writer, weights, group, first, chunk, kind);
            }
}
