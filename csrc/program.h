/* What the vector paths make of a layer's weights: planes to pack and a program to run. See README.md. */
#ifndef SYSMT_PROGRAM_H
#define SYSMT_PROGRAM_H

#include "kernels.h"
#include "tuning.h"

enum {
    QUAD = 4,        /* operands that are packed together: 4 / T slots */
    PATTERNS = 16,   /* which of a quad's activations are non-zero */
    BLOCK = 8,       /* output channels that share the loads of the dense stream */
    MAX_PLANES = 64, /* more than any rule needs: 11 weight patterns of two or more times 4 kinds */
};

/* What a path's multiplier takes. */
typedef struct {
    int word_operands;  /* in a 32-bit word: 4 (8 bits each) or 2 (16 bits each) */
    bool has_ninth_bit; /* operands hold what rounding makes of 248..255 (256) and of 120..127 (+128) */
    enum { ANY_SIGN, UNSIGNED, SIGNED } activations; /* where they are of the other kind, they are biased */
    enum { FLAG_AS_BIT, FLAG_AS_SHIFT } flags;       /* how a contest's words say which flag: see below */
} Format;

/* What is added to activations to make them of the kind that the multiplier takes. */
static inline int bias_of(const Format *format, bool is_signed) {
    if (format->activations == UNSIGNED && is_signed)
        return 128;
    return format->activations == SIGNED && !is_signed ? -128 : 0;
}

/* What a plane holds of an activation, given the non-zero pattern of its quad. */
typedef enum { ZERO, EXACT, REDUCED, NARROW, WIDE } Code;

typedef struct {
    uint8_t code[PATTERNS][QUAD];
} Plane;

/* What a dense stream does at each step, for all channels of a block; 32-bit words per channel in brackets.
 *
 * Contests are slots of four threads, and what they multiply depends on how many are active:
 *
 *     up to one:  exact activations by w;    two:  (mask ? reduced : exact) by w;    more:  reduced by w4
 *
 * Where all four weights are there, that is the same for all channels, so that P0 and P1 know most of it.
 */
typedef enum {
    FORM_NONE,   /* no dense stream */
    FORM_PLAIN,  /* acc += P0 * w [w] */
    FORM_SELECT, /* acc += (mask ? P1 : P0) * w, byte by byte [w, mask] */
    FORM_FULL,   /* contests of four weights: acc += (mask ? P1 : P0) * (three or more active ? w4 : w)
                    [w, w4, mask if narrow weights spare; else P0 alone] */
    FORM_MIXED,  /* contests of any weights; P0 is exact, P1 reduced
                    [w, w4, flag of two active, of three, mask likewise] */
} Form;

/* acc += plane[step] * word, for one output channel. */
typedef struct {
    uint32_t where; /* plane << STEP_BITS | step */
    uint32_t word;
} Entry;

enum { STEP_BITS = 24 };

/* Flags of a position, by weight pattern: whether two, or three, of the weights meet a non-zero activation.
 * Three of four weights are the sign of 16 bits, which AVX2 tests for nothing. */
static const uint16_t TWO_FLAG[PATTERNS] = {[3] = 1 << 0,  [5] = 1 << 1,  [6] = 1 << 2,  [7] = 1 << 3,
                                            [9] = 1 << 4,  [10] = 1 << 5, [11] = 1 << 6, [12] = 1 << 7,
                                            [13] = 1 << 8, [14] = 1 << 9, [15] = 1 << 10};
static const uint16_t THREE_FLAG[PATTERNS] = {
    [7] = 1 << 11, [11] = 1 << 12, [13] = 1 << 13, [14] = 1 << 14, [15] = 1 << 15};

/* A flag in the stream of contests. FLAG_AS_BIT: in both halves of a word, for comparisons of 16 bits;
 * FLAG_AS_SHIFT: the shift that makes it the sign of 32. */
static inline uint32_t in_both_halves(uint16_t flag) {
    return flag * 0x10001u;
}
static inline uint32_t shift_of_flag(uint16_t flag) {
    return flag ? (uint32_t)__builtin_clz(flag) : 32;
}

/* A team of TEAM channels shares the steps of its contests. It is smaller than a block: the smaller, the more
 * often all of its slots are full. For each team of a block and each chunk, full steps, then mixed ones; and
 * where their steps and words start. */
enum { TEAM = 4, TEAMS = BLOCK / TEAM };
enum { FULL, MIXED, STREAMS };
typedef struct {
    int64_t step, word;
} Start;

struct Layer {
    ConvShape shape;
    SlotRule rule;
    const VectorOps *ops; /* of the path that packed it */
    Format format;        /* its own */
    bool is_im2col;       /* k stands for the channel of a 1 x 1 convolution over the im2col matrix */

    /* The convolution after lowering, per group. */
    int64_t channels, taps;
    int64_t slots, quads; /* per tap */
    int32_t *channel_of;  /* (groups, quads, QUAD), -1 for padding */

    /* The program. K is worked off in chunks of quads, so that a chunk's planes stay in the core's cache. */
    int64_t chunk_quads, chunks;
    int64_t steps;  /* (chunk, tap, quad of the chunk, word of the quad) */
    int64_t blocks; /* of BLOCK channels, per group */
    Form form;
    int dense_plane[2];          /* P0, P1 */
    uint32_t *dense;             /* (groups, blocks, steps, words of the form, BLOCK), in the order below */
    Entry *entries;              /* sorted by (group, n) */
    int64_t *first_entry;        /* (groups * n * chunks + 1) */
    uint32_t *order;             /* the steps, in the order of the dense stream; AHEAD more may be read */
    bool has_contests;           /* then there are no entries, and order and dense are by block: */
    Start *starts;               /* (groups, blocks, chunks, TEAMS, STREAMS; + 1) */
    uint32_t flags_of[PATTERNS]; /* what a position raises, by activation pattern */
    int32_t *offset;             /* (groups * n): minus the planes' bias times the sum of the words */
    Plane planes[MAX_PLANES];
    int plane_count;

    /* For the counters and for rare activations that need 9 bits. */
    int32_t *tallies; /* (groups, taps, quads, slots of a quad, tally_length) */
    uint32_t *raw;    /* (groups, taps, quads, n): the four int8 weights; NULL where 9 bits fit */
};

Layer *program_pack(const ConvShape *shape, const SlotRule *rule, const int8_t *weights, const int32_t *k_of,
                    const Format *format);
size_t program_bytes(const Layer *layer);
void program_release(Layer *layer);

static inline int form_words(Form form, bool spares) {
    static const int WORDS[] = {0, 1, 2, 2, 4};
    return WORDS[form] + (spares && (form == FORM_FULL || form == FORM_MIXED));
}

/* Channels of a block whose words lie side by side, and that a stream is for. */
static inline int form_channels(Form form) {
    return form == FORM_FULL || form == FORM_MIXED ? TEAM : BLOCK;
}

/* P0 or P1 of a form. */
static inline int plane_of_form(const Layer *layer, Form form, int which) {
    return form == FORM_MIXED ? which : layer->dense_plane[which];
}

static inline int words_per_quad(const Layer *layer) {
    return QUAD / layer->format.word_operands;
}

/* Quads of one chunk; the last may have fewer. */
static inline int64_t quads_of_chunk(const Layer *layer, int64_t chunk) {
    int64_t left = layer->quads - chunk * layer->chunk_quads;
    return left < layer->chunk_quads ? left : layer->chunk_quads;
}

static inline int64_t first_step(const Layer *layer, int64_t chunk) {
    return chunk * layer->chunk_quads * layer->taps * words_per_quad(layer);
}

static inline int64_t steps_of_chunk(const Layer *layer, int64_t chunk) {
    return quads_of_chunk(layer, chunk) * layer->taps * words_per_quad(layer);
}

/* Output positions that a job aims at: their sums, for all channels, stay in the core's cache, too. */
static inline int64_t wanted_positions(const Layer *layer) {
    int64_t positions = SUMS_BYTES / 4 / (layer->shape.n ? layer->shape.n : 1);
    return positions < LEAST_JOB_POSITIONS  ? LEAST_JOB_POSITIONS
           : positions > MOST_JOB_POSITIONS ? MOST_JOB_POSITIONS
                                            : positions;
}

static inline int slots_per_quad(const SlotRule *rule) {
    return QUAD / rule->threads;
}

#endif
