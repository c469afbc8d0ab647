/* The planner: from the slot rule and one layer's weights to planes and a program.
 *
 * For a given weight pattern of a slot, what a thread feeds the multiplier is a function of the activations
 * alone. Each such function is a plane. A weight then contributes to at most two products: its exact value
 * times one plane, and its reduced value times another. Everything the inner loops do not know (policies, T,
 * rounding, signs) ends here.
 */
#include "program.h"
#include "tally.h"
#include "tuning.h"
#include "writer.h"

#include <stdlib.h>
#include <string.h>

/* ---- what one quad of weights contributes ---- */

typedef struct {
    int plane[2 * QUAD + 1];
    int16_t value[2 * QUAD + 1][QUAD]; /* weights that meet this plane, 0 elsewhere */
    int count;
} Terms;

static void add_term(Terms *terms, int plane, int byte, int value) {
    if (plane < 0 || value == 0)
        return;
    int i = 0;
    while (i < terms->count && terms->plane[i] != plane)
        i++;
    if (i == terms->count) {
        terms->plane[terms->count++] = plane;
        memset(terms->value[i], 0, sizeof terms->value[i]);
    }
    terms->value[i][byte] = (int16_t)value;
}

/* The products of one quad, as (plane, four weights) pairs. */
static Terms quad_terms(PlaneSet *set, const SlotRule *rule, const int8_t weights[QUAD]) {
    Terms terms = {.count = 0};
    for (int byte = 0; byte < QUAD; byte++) {
        int exact = weights[byte], reduced = used_weight(exact, rule);
        if (!exact)
            continue;
        int pattern = slot_pattern_of(weights, byte, rule->threads);
        if (exact == reduced) {
            bool is_spared = rule->needs_both && !is_reducible(exact, true, rule);
            add_term(&terms, find_plane(set, rule, is_spared ? WITH_EITHER_SPARED : WITH_EITHER, pattern),
                     byte, exact);
        } else {
            add_term(&terms, find_plane(set, rule, WITH_EXACT, pattern), byte, exact);
            add_term(&terms, find_plane(set, rule, WITH_REDUCED, pattern), byte, reduced);
        }
    }
    return terms;
}

/* ---- the layer ---- */

/* What the forms would cost, from a first look at all quads. */
typedef struct {
    int64_t quads, terms, of_plane[MAX_PLANES];
} Census;

static Census take_census(const Layer *layer, const int8_t *weights, PlaneSet *set) {
    Census census = {0};
    for (int64_t group = 0; group < layer->shape.groups; group++)
        for (int64_t n = 0; n < layer->shape.n; n++)
            for (int64_t tap = 0; tap < layer->taps; tap++)
                for (int64_t quad = 0; quad < layer->quads; quad++) {
                    int8_t w[QUAD];
                    fetch_quad(layer, weights, group, n, tap, quad, w);
                    Terms terms = quad_terms(set, &layer->rule, w);
                    census.quads++;
                    census.terms += terms.count;
                    for (int i = 0; i < terms.count; i++)
                        census.of_plane[terms.plane[i]]++;
                }
    return census;
}

static void choose_form(Layer *layer, const int8_t *weights) {
    const SlotRule *rule = &layer->rule;
    PlaneSet set = {.count = 0};
    Census census = take_census(layer, weights, &set);
    double best = COST_ENTRY * (double)census.terms, quads = (double)census.quads;
    layer->form = FORM_NONE;
    int plane = 0, second = -1;
    for (int i = 1; i < set.count; i++)
        if (census.of_plane[i] > census.of_plane[plane])
            plane = i;
    for (int i = 0; i < set.count; i++)
        if (i != plane && (second < 0 || census.of_plane[i] > census.of_plane[second]))
            second = i;
    double plain = COST_PLAIN * quads + COST_ENTRY * (double)(census.terms - census.of_plane[plane]);
    if (set.count && plain < best) {
        best = plain;
        layer->form = FORM_PLAIN;
    }
    if (rule->threads == 2 && !rule->reduces_weight && second >= 0 && COST_SELECT * quads < best)
        layer->form = FORM_SELECT;

    /* The planes of the dense stream come first; the entries ask for more. */
    PlaneSet chosen = {.count = 0};
    if (layer->form == FORM_PLAIN || layer->form == FORM_SELECT)
        chosen.planes[chosen.count++] = set.planes[plane];
    if (layer->form == FORM_SELECT)
        chosen.planes[chosen.count++] = set.planes[second];
    memcpy(layer->planes, chosen.planes, sizeof layer->planes);
    layer->plane_count = chosen.count;
    layer->dense_plane[0] = 0;
    layer->dense_plane[1] = chosen.count - 1;
}

static void write_entry(Writer *writer, int plane, int64_t quad_step, int16_t values[QUAD]) {
    Layer *layer = writer->layer;
    int halves = QUAD / layer->format.word_operands;
    int16_t rest[QUAD];
    bool overflows = !layer->format.has_ninth_bit && split_overflow(values, rest);
    for (int half = 0; half < halves; half++) {
        uint32_t word = encode(values, half, layer->format.word_operands);
        if (!word)
            continue;
        if (!writer->is_counting)
            layer->entries[writer->entry] =
                (Entry){(uint32_t)plane << STEP_BITS | (uint32_t)(quad_step * halves + half), word};
        writer->entry++;
    }
    for (int byte = 0; byte < QUAD; byte++)
        writer->word_sum += values[byte];
    if (overflows)
        write_entry(writer, plane, quad_step, rest);
}

static void write_dense(Writer *writer, uint32_t *block, int64_t quad_step, int lane, int which,
                        const int16_t values[QUAD]) {
    Layer *layer = writer->layer;
    int halves = QUAD / layer->format.word_operands, words = form_words(layer->form, false);
    for (int half = 0; half < halves && !writer->is_counting; half++)
        block[((quad_step * halves + half) * words + which) * BLOCK + lane] =
            encode(values, half, layer->format.word_operands);
}

/* A quad's terms: those whose plane the dense stream has go there, the rest become entries. */
static void write_terms(Writer *writer, uint32_t *block, int64_t quad_step, int lane, const int8_t w[QUAD]) {
    Layer *layer = writer->layer;
    Terms terms = quad_terms(&writer->set, &layer->rule, w);
    int16_t word[QUAD] = {0}, mask[QUAD] = {0};
    bool has_streams = layer->form == FORM_PLAIN || layer->form == FORM_SELECT;
    for (int i = 0; i < terms.count; i++) {
        bool is_second = layer->form == FORM_SELECT && terms.plane[i] == layer->dense_plane[1];
        if (!has_streams || !(terms.plane[i] == layer->dense_plane[0] || is_second)) {
            write_entry(writer, terms.plane[i], quad_step, terms.value[i]);
            continue;
        }
        int16_t rest[QUAD];
        if (!layer->format.has_ninth_bit && split_overflow(terms.value[i], rest))
            write_entry(writer, terms.plane[i], quad_step, rest);
        for (int byte = 0; byte < QUAD; byte++) {
            word[byte] = (int16_t)(word[byte] + terms.value[i][byte]);
            writer->word_sum += terms.value[i][byte];
            mask[byte] = is_second && terms.value[i][byte] ? -1 : mask[byte];
        }
    }
    if (has_streams)
        write_dense(writer, block, quad_step, lane, 0, word);
    if (layer->form == FORM_SELECT)
        write_dense(writer, block, quad_step, lane, 1, mask);
}

static void write_channel(Writer *writer, const int8_t *weights, int64_t group, int64_t n) {
    Layer *layer = writer->layer;
    int64_t block_words = layer->steps * form_words(layer->form, false) * BLOCK;
    uint32_t *block = layer->dense + (group * layer->blocks + n / BLOCK) * block_words;
    int64_t step = 0;
    writer->word_sum = 0;
    for (int64_t chunk = 0; chunk < layer->chunks; chunk++) {
        if (!writer->is_counting)
            layer->first_entry[(group * layer->shape.n + n) * layer->chunks + chunk] = writer->entry;
        for (int64_t tap = 0; tap < layer->taps; tap++)
            for (int64_t quad = 0; quad < quads_of_chunk(layer, chunk); quad++, step++) {
                int8_t w[QUAD];
                fetch_quad(layer, weights, group, n, tap, chunk * layer->chunk_quads + quad, w);
                write_terms(writer, block, step, (int)(n % BLOCK), w);
            }
    }
}

/* ---- writing it all ---- */

/* How much one pass over the weights wrote, or would. */
typedef struct {
    int64_t entries, steps, words, full_steps;
} Written;

/* One pass over the weights; also notes the planes that are in use. */
static Written write_program(Layer *layer, const int8_t *weights, bool is_counting) {
    Writer writer = {.layer = layer, .is_counting = is_counting};
    memcpy(writer.set.planes, layer->planes, sizeof layer->planes);
    writer.set.count = layer->plane_count;
    int64_t channels = layer->shape.groups * layer->shape.n, blocks = layer->shape.groups * layer->blocks;
    for (int64_t i = 0; i < blocks && layer->has_contests; i++)
        write_contest_block(&writer, weights, i / layer->blocks, i % layer->blocks);
    for (int64_t i = 0; i < channels && !layer->has_contests; i++) {
        write_channel(&writer, weights, i / layer->shape.n, i % layer->shape.n);
        if (!is_counting)
            layer->offset[i] = -bias_of(&layer->format, layer->rule.is_signed) * writer.word_sum;
    }
    if (!layer->has_contests) {
        writer.step = layer->steps;
        writer.word = blocks * layer->steps * form_words(layer->form, false) * BLOCK;
        for (int64_t step = 0; step < layer->steps && !is_counting; step++)
            layer->order[step] = (uint32_t)step;
    }
    if (!is_counting) {
        layer->first_entry[channels * layer->chunks] = writer.entry;
        layer->starts[blocks * layer->chunks * TEAMS * STREAMS] = (Start){writer.step, writer.word};
    }
    memcpy(layer->planes, writer.set.planes, sizeof layer->planes);
    layer->plane_count = writer.set.count;
    return (Written){writer.entry, writer.step, writer.word, writer.full_steps};
}

/* As many quads as keep a job's planes in the core's cache; most planes are rarely touched beside a dense
 * stream. */
static void choose_chunks(Layer *layer) {
    const ConvShape *shape = &layer->shape;
    int64_t phases = layer->is_im2col ? 1 : shape->conv_stride_h * shape->conv_stride_w;
    phases = phases < layer->taps ? phases : layer->taps;
    int64_t position_bytes = (4 * layer->plane_count + 2 * layer->has_contests) * words_per_quad(layer);
    int64_t quad_bytes = wanted_positions(layer) * position_bytes * phases;
    int64_t bytes = layer->form == FORM_NONE ? ENTRY_CHUNK_BYTES : DENSE_CHUNK_BYTES;
    int64_t quads = quad_bytes ? bytes / quad_bytes : layer->quads;
    quads = quads < LEAST_CHUNK_QUADS ? LEAST_CHUNK_QUADS : quads;
    if (layer->quads == 0)
        return; /* an empty layer: one empty chunk */
    layer->chunks = (layer->quads + quads - 1) / quads;
    layer->chunk_quads = (layer->quads + layer->chunks - 1) / layer->chunks;
    layer->chunks = (layer->quads + layer->chunk_quads - 1) / layer->chunk_quads;
}

/* Which channel stands at (quad, byte): channels of one slot, and of neighbouring slots where T < 4. */
static void place_channels(Layer *layer, const int32_t *k_of) {
    int threads = layer->rule.threads, per_quad = slots_per_quad(&layer->rule);
    for (int64_t group = 0; group < layer->shape.groups; group++)
        for (int64_t quad = 0; quad < layer->quads; quad++)
            for (int byte = 0; byte < QUAD; byte++) {
                int64_t slot = quad * per_quad + byte / threads,
                        position = byte % threads * layer->slots + slot;
                int32_t *channel = layer->channel_of + (group * layer->quads + quad) * QUAD + byte;
                if (slot >= layer->slots)
                    *channel = -1;
                else if (layer->taps > 1)
                    *channel = (int32_t)position; /* k = (t * C/T + slot) * taps + tap: plain order */
                else
                    *channel = k_of[group * threads * layer->slots + position];
            }
}

/* Whether K is in plain order, so that slots can pair channels of the same pixel. */
static bool is_plain_order(const ConvShape *shape, const int32_t *k_of, int64_t length) {
    for (int64_t i = 0; i < shape->groups * length; i++)
        if (k_of[i] != i % length)
            return false;
    return true;
}

static void count_weights(Layer *layer, const int8_t *weights) {
    int threads = layer->rule.threads, length = tally_length(threads, tally_kind(&layer->rule));
    int32_t *counts = layer->tallies;
    int64_t k = layer->channels * layer->taps;
    for (int64_t group = 0; group < layer->shape.groups; group++)
        for (int64_t tap = 0; tap < layer->taps; tap++)
            for (int64_t quad = 0; quad < layer->quads; quad++)
                for (int first = 0; first < QUAD; first += threads, counts += length) {
                    const int32_t *channel = layer->channel_of + (group * layer->quads + quad) * QUAD + first;
                    const int8_t *columns[MAX_THREADS] = {0};
                    for (int t = 0; t < threads; t++)
                        if (channel[t] >= 0)
                            columns[t] =
                                weights + group * layer->shape.n * k + channel[t] * layer->taps + tap;
                    tally_weights(columns, layer->shape.n, k, &layer->rule, counts);
                }
}

static void keep_raw(Layer *layer, const int8_t *weights) {
    uint32_t *out = layer->raw;
    for (int64_t group = 0; group < layer->shape.groups; group++)
        for (int64_t tap = 0; tap < layer->taps; tap++)
            for (int64_t quad = 0; quad < layer->quads; quad++)
                for (int64_t n = 0; n < layer->shape.n; n++) {
                    int8_t w[QUAD];
                    fetch_quad(layer, weights, group, n, tap, quad, w);
                    memcpy(out++, w, sizeof w);
                }
}

static void *allocate(int64_t count, size_t size) {
    size_t bytes = ((size_t)count * size + 127) / 64 * 64;
    void *memory = aligned_alloc(64, bytes);
    if (memory)
        memset(memory, 0, bytes);
    return memory;
}

/* Activations of 256 (or +128 biased) exist only where rounding goes up and bytes must hold the result. */
static bool needs_ninth_bit(const Layer *layer) {
    const SlotRule *rule = &layer->rule;
    return !layer->format.has_ninth_bit && rule->threads > 1 && !rule->saturate && !rule->truncate;
}

Layer *program_pack(const ConvShape *shape, const SlotRule *rule, const int8_t *weights, const int32_t *k_of,
                    const Format *format) {
    Layer *layer = calloc(1, sizeof *layer);
    if (!layer)
        return NULL;
    int64_t taps = shape->kh * shape->kw, k = shape->c * taps,
            length = slot_count(shape, rule) * rule->threads;
    layer->shape = *shape;
    layer->rule = *rule;
    layer->format = *format;
    layer->is_im2col = taps > 1 && (shape->c % rule->threads || !is_plain_order(shape, k_of, length));
    layer->channels = layer->is_im2col ? k : shape->c;
    layer->taps = layer->is_im2col ? 1 : taps;
    layer->slots = (layer->channels + rule->threads - 1) / rule->threads;
    layer->quads = (layer->slots + slots_per_quad(rule) - 1) / slots_per_quad(rule);
    layer->steps = layer->taps * layer->quads * words_per_quad(layer);
    layer->blocks = (shape->n + BLOCK - 1) / BLOCK;
    int64_t outputs = shape->groups * shape->n, quads = shape->groups * layer->taps * layer->quads;
    layer->channel_of = allocate(shape->groups * layer->quads * QUAD, sizeof *layer->channel_of);
    layer->offset = allocate(outputs, sizeof *layer->offset);
    layer->tallies = allocate(quads * slots_per_quad(rule) * tally_length(rule->threads, tally_kind(rule)),
                              sizeof *layer->tallies);
    if (needs_ninth_bit(layer))
        layer->raw = allocate(quads * shape->n, sizeof *layer->raw);
    if (!layer->channel_of || !layer->offset || !layer->tallies || (needs_ninth_bit(layer) && !layer->raw)) {
        program_release(layer);
        return NULL;
    }
    place_channels(layer, k_of);
    layer->has_contests = makes_contests(rule, format);
    if (layer->has_contests)
        choose_contests(layer);
    else
        choose_form(layer, weights);
    layer->chunks = 1;
    layer->chunk_quads = layer->quads; /* until the planes are counted */
    Written written = write_program(layer, weights, true);
    layer->entries = allocate(written.entries, sizeof *layer->entries);
    layer->order = allocate(written.steps + AHEAD, sizeof *layer->order);
    layer->dense = allocate(written.words, sizeof *layer->dense);
    if (layer->has_contests && !written.full_steps)
        layer->plane_count = 2;
    choose_chunks(layer);
    layer->first_entry = allocate(outputs * layer->chunks + 1, sizeof *layer->first_entry);
    layer->starts =
        allocate(shape->groups * layer->blocks * layer->chunks * TEAMS * STREAMS + 1, sizeof *layer->starts);
    if (!layer->dense || !layer->entries || !layer->order || !layer->first_entry || !layer->starts) {
        program_release(layer);
        return NULL;
    }
    write_program(layer, weights, false);
    count_weights(layer, weights);
    if (layer->raw)
        keep_raw(layer, weights);
    return layer;
}

size_t program_bytes(const Layer *layer) {
    const ConvShape *shape = &layer->shape;
    int64_t outputs = shape->groups * shape->n, quads = shape->groups * layer->taps * layer->quads;
    int64_t bytes = shape->groups * layer->quads * QUAD * 4 + outputs * (4 + 8 * layer->chunks);
    int64_t starts = shape->groups * layer->blocks * layer->chunks * TEAMS * STREAMS;
    bytes += starts * (int64_t)sizeof(Start) + 4 * (layer->starts[starts].step + layer->starts[starts].word);
    bytes += layer->first_entry[outputs * layer->chunks] * (int64_t)sizeof(Entry);
    bytes += quads * slots_per_quad(&layer->rule) *
             tally_length(layer->rule.threads, tally_kind(&layer->rule)) * 4;
    bytes += layer->raw ? quads * shape->n * 4 : 0;
    return (size_t)bytes;
}

void program_release(Layer *layer) {
    if (!layer)
        return;
    free(layer->channel_of);
    free(layer->first_entry);
    free(layer->offset);
    free(layer->tallies);
    free(layer->raw);
    free(layer->dense);
    free(layer->entries);
    free(layer->order);
    free(layer->starts);
    free(layer);
}
