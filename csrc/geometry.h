/* Where pixels lie in the packed tracks, and how a layer is cut into jobs. See README.md for a drawing. */
#ifndef SYSMT_GEOMETRY_H
#define SYSMT_GEOMETRY_H

#include "program.h"

/* One kernel offset: a shift within one phase of the input. */
typedef struct {
    int phase;
    int64_t dy, dx; /* in phase rows and columns */
} Tap;

/* The input pixels (stride_h * i + y, stride_w * j + x). */
typedef struct {
    int64_t y, x;
    int64_t width; /* columns that are read */
} Phase;

typedef struct {
    Source source; /* as given, or with axes merged */
    Sink sink;
    int64_t out_height, out_width;
    int64_t conv_stride_h, conv_stride_w;
    bool is_pointwise; /* one tap, no padding: no borders in the tracks */

    Tap *taps;
    Phase *phases;
    int phase_count;
    int64_t dy_min, dy_max, dx_min, dx_max;

    int64_t guard; /* zero positions in front of the first row */
    int64_t pitch; /* positions from row to row */

    int64_t pieces; /* an output row is cut into this many rows of the track */
    int64_t rows;   /* rows of all images */
    int64_t rows_per_job;
    int64_t jobs_per_image; /* 0: jobs take rows of several images */
    int64_t jobs;
    int64_t stage_rows;   /* rows_per_job and what the taps need beyond */
    int64_t track_stride; /* positions from track to track */
} Geometry;

/* One row of a track. */
typedef struct {
    int64_t image, y, x, length; /* output pixels (y, x .. x + length) */
} Row;

bool geometry_make(Geometry *geometry, const Layer *layer, const Source *source, const Sink *sink,
                   int cpu_threads);
void geometry_release(Geometry *geometry);

Row geometry_row(const Geometry *geometry, int64_t row);

/* First row of a job and how many it has. */
void geometry_job(const Geometry *geometry, int64_t job, int64_t *first, int64_t *count);

/* Positions that a tap lies behind the output position, from the start of the track. */
static inline int64_t tap_shift(const Geometry *geometry, const Tap *tap) {
    return geometry->guard + (tap->dy - geometry->dy_min) * geometry->pitch + tap->dx;
}

#endif
