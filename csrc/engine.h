/* What the vector paths share: geometry, staging, jobs, threads. A path brings the VectorOps. See README.md.
 */
#ifndef SYSMT_ENGINE_H
#define SYSMT_ENGINE_H

#include "kernels.h"
#include "program.h"
#include "seen.h"
#include "tally.h"
#include "tuning.h"

#include <stdatomic.h>

enum {
    TILE = 128, /* output positions that are accumulated together */
    GRAIN = 64, /* tracks are multiples of this many positions */
    STORED = 2, /* blocks that are stored together: 16 channels are a cache line */
};

/* An activation whose reduced value needs nine bits: the plane holds one less. */
typedef struct {
    int32_t position, phase, quad;
    uint8_t byte, pattern;
} Event;

typedef struct {
    Event *list;
    int64_t capacity;
    atomic_int_fast64_t count; /* goes on counting beyond the capacity */
} Events;

/* A plane's codes as AND-masks, looked up by the non-zero pattern of a quad. */
typedef struct {
    bool is_exact;       /* the activations as they are */
    bool uses[WIDE + 1]; /* by Code */
    uint32_t masks[WIDE + 1][PATTERNS];
} PlaneMasks;

/* One quad of channels of one phase: bytes in, planes out. */
typedef struct {
    const uint8_t *channel[QUAD];
    int64_t positions; /* a multiple of GRAIN */
    const SlotRule *rule;
    const PlaneMasks *planes;
    int plane_count;
    uint8_t flip;   /* added to every byte without carry: 0x80 where the format wants the other sign */
    bool is_excess; /* pack what the ninth bit holds instead: 1 where a reduced value is one short */
    uint32_t *out;  /* plane p at out + p * plane_stride; second word of the quad at + word_stride */
    int64_t plane_stride, word_stride;
    uint16_t *flags;          /* of the first word, then at + word_stride; NULL if not needed */
    const uint32_t *flags_of; /* (PATTERNS) */
    Events *events;           /* NULL if not needed */
    int32_t phase, quad;
} PackArguments;

/* Bytes of slots' channels, to be counted: all of them, then those in each column. */
typedef struct {
    const SlotRule *rule;
    int64_t slots;
    const int32_t *channel_of; /* (slots, threads); -1: padding */
    const uint8_t *bytes;      /* of channel 0 */
    int64_t channel_stride, count;
    const uint64_t *masks; /* (columns, mask_stride): a bit per byte */
    int64_t columns, mask_stride;
    int64_t *counts; /* (slots, counts_stride), of which (1 + columns, tally_length) are added to */
    int64_t counts_stride;
} CountArguments;

/* One region's counts, the sum of several workspaces, and the weights of the taps that see it. */
typedef struct {
    const SlotRule *rule;
    int64_t slots;
    const int64_t *const
        *counts; /* (workspaces), each (slots, counts_stride) of which tally_length belong here */
    int64_t counts_stride;
    int workspaces;
    const int32_t *weights; /* (taps of the layer: tap_stride, slots, tally_length) */
    int64_t tap_stride;
    const int64_t *tap; /* (taps): which */
    int64_t taps;
    int sign;
    Tally *tally; /* added to */
} FoldArguments;

/* Steps of a block of channels, and their words. */
typedef struct {
    const uint32_t *order;
    int64_t steps;
    const uint32_t *words;
} Stream;

/* One block of channels times one tile of positions, added to acc. */
typedef struct {
    const uint32_t *planes; /* at the tile's first position */
    int64_t plane_stride;
    const uint16_t *flags;       /* likewise */
    const uint32_t *step_offset; /* positions, by step of the layer */
    const Layer *layer;
    Stream streams[TEAMS][STREAMS]; /* of this block and chunk; without contests the first alone */
    const int64_t *first_entry;     /* of its first channel, this chunk; a channel further: + chunks */
    int channels;                   /* 1..BLOCK */
    int positions;                  /* 1..TILE */
    int32_t (*acc)[TILE];           /* (BLOCK, TILE) */
    const char **ran_on;            /* set to the name of the path that multiplies */
} MultiplyArguments;

#define NOWHERE INT64_MIN

/* Where a tile's positions go: spans of neighbours in memory. */
typedef struct {
    int64_t to;     /* element offset */
    int first;      /* lane of the tile, a multiple of 16 */
    uint16_t lanes; /* of the 16 from there */
} Span;

typedef struct {
    const Sink *sink;
    int64_t first_channel;   /* over all groups */
    int channels, positions; /* channels: 1..STORED * BLOCK */
    const Span *spans;       /* used where the sink's rows are contiguous */
    int span_count;
    const int64_t *lane_to; /* (TILE): element offset, or NOWHERE; used elsewhere */
    const bool *is_whole;   /* (TILE / 16): whether 16 lanes are neighbours in one row; likewise */
    const int32_t (*acc[STORED])[TILE]; /* of each block */
} StoreArguments;

/* The sums of one of the channels that are stored together. */
static inline const int32_t *stored_sums(const StoreArguments *store, int channel) {
    return store->acc[channel / BLOCK][channel % BLOCK];
}

/* How activations become bytes. */
typedef struct {
    float inverse_scale;
    bool is_signed;
} Quantiser;

/* What an instruction set has to offer. */
struct VectorOps {
    Format format; /* what the planes and words are made of that its functions read */
    void (*quantise_row)(const float *from, int64_t stride, int64_t count, const Quantiser *quantiser,
                         uint8_t *to, Seen *seen);
    /* count pixels of `channels` neighbours each, to[channel * channel_stride + pixel] */
    void (*quantise_pixels)(const float *from, int64_t pixel_stride, int64_t count, int64_t channels,
                            const Quantiser *quantiser, uint8_t *to, int64_t channel_stride, Seen *seen);
    void (*transpose_pixels)(const uint8_t *from, int64_t pixel_stride, int64_t count, int64_t channels,
                             uint8_t *to, int64_t channel_stride);
    void (*pack)(const PackArguments *arguments);
    void (*count)(const CountArguments *arguments);
    void (*fold)(const FoldArguments *arguments);
    void (*multiply)(const MultiplyArguments *arguments);
    /* Add an event's missing 1 times the weight it meets, for n = 0..count-1. */
    void (*correct)(const uint32_t *raw, int64_t count, const Event *event, const SlotRule *rule,
                    int32_t *sums);
    void (*store)(const StoreArguments *arguments);
};

/* What vector paths have in common, as a Path has it. */
Layer *engine_pack(const VectorOps *ops, const ConvShape *shape, const SlotRule *rule, const int8_t *weights,
                   const int32_t *k_of);
bool engine_run(const Layer *layer, const Source *source, const Sink *sink, int cpu_threads, bool count,
                Outcome *outcome);

#define VECTOR_PATH(name, is_supported, ops)                                                                 \
    {name, is_supported, ops, engine_pack, engine_run, program_bytes, program_release}

/* For compilers and processors that a path is not written for. */
#define PATH_NOT_BUILT(name) VECTOR_PATH(name, path_not_built, NULL)

/* For the loops that every vector path compiles for itself. */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#endif
