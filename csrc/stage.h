/* Staging: a job's activations as bytes, channel by channel, in the order of tracks. */
#ifndef SYSMT_STAGE_H
#define SYSMT_STAGE_H

#include "engine.h"
#include "geometry.h"

/* The part of a job that staging and counting look at. */
typedef struct {
    const VectorOps *ops;
    const Layer *layer;
    const Geometry *geometry;
    int64_t group;
    int64_t first_row, rows; /* of the track */
    uint8_t *stage;          /* (channels, phases, geometry->track_stride) */
    uint8_t *raw;            /* im2col: (channels, rows, width) of the input */
} StageArguments;

static inline uint8_t *staged(const StageArguments *stage, int64_t channel, int phase) {
    const Geometry *geometry = stage->geometry;
    return stage->stage + (channel * geometry->phase_count + phase) * geometry->track_stride;
}

/* Bytes of the two buffers; 0 where one is not needed. */
size_t stage_bytes(const Layer *layer, const Geometry *geometry);
size_t stage_raw_bytes(const Layer *layer, const Geometry *geometry);

/* Quantise (or copy) channels first..end-1; of the input, which for im2col means the raw rows. */
void stage_channels(const StageArguments *stage, int64_t first, int64_t end, Seen *seen);

/* im2col: fill the track rows of k = first..end-1 from the raw rows. */
void stage_im2col(const StageArguments *stage, int64_t first, int64_t end);

#endif
