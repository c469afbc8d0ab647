/* Activations of nine bits. Rounding makes 256 of 248..255 (+128 of 120..127); where operands have eight
 * bits, the plane holds one less, and what is missing is made up for here: one event at a time, before the
 * sums are stored. Where events are many, the engine packs and multiplies second planes instead.
 */
#ifndef SYSMT_NINTH_BIT_H
#define SYSMT_NINTH_BIT_H

#include "engine.h"
#include "geometry.h"

/* One event seen by one output position. */
typedef struct {
    int32_t event, tap;
    int32_t position;
} Correction;

/* The events of one job, and what follows from them. */
typedef struct {
    Events events;
    Correction *corrections; /* sorted by tile */
    int64_t *first;          /* (tiles + 1), the first of each tile; NULL if there are none */
} NinthBits;

/* Room for so many events; false when memory runs out. */
bool ninth_bits_make(NinthBits *bits, int64_t capacity);
void ninth_bits_release(NinthBits *bits);

/* Sort the events' effects on a job's output positions by tile; false when memory runs out. */
bool ninth_bits_settle(NinthBits *bits, const Layer *layer, const Geometry *geometry, int64_t positions);

/* Sums to add to the channels of one tile, for the positions that events touch. */
typedef struct {
    int32_t *sums; /* (touched, channels) */
    int16_t row_of[TILE];
    int touched;
} TileCorrections;

/* Work out a tile's for some of a group's channels; `sums` is made when first needed, the caller frees it.
 * False when memory runs out. */
bool ninth_bits_of_tile(const NinthBits *bits, const Layer *layer, int64_t group, int64_t tile,
                        int64_t first_channel, int64_t channels, TileCorrections *corrections);

/* Add to the `count` channels of acc, which are those from `first` on of all `channels`. */
void ninth_bits_add(const TileCorrections *corrections, int64_t channels, int64_t first, int count,
                    int32_t acc[BLOCK][TILE]);

#endif
