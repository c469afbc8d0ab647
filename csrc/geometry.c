#include "geometry.h"

#include <stdlib.h>

static int64_t floor_div(int64_t a, int64_t b) {
    return a >= 0 ? a / b : -((-a + b - 1) / b);
}
static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int find_phase(Geometry *geometry, int64_t y, int64_t x) {
    int i = 0;
    while (i < geometry->phase_count && (geometry->phases[i].y != y || geometry->phases[i].x != x))
        i++;
    if (i == geometry->phase_count)
        geometry->phases[geometry->phase_count++] = (Phase){.y = y, .x = x};
    return i;
}

/* Split every kernel offset into a phase of the input and a whole shift within it. */
static void place_taps(Geometry *geometry, const ConvShape *shape) {
    for (int64_t kh = 0; kh < shape->kh; kh++)
        for (int64_t kw = 0; kw < shape->kw; kw++) {
            int64_t y = kh * shape->dilation_h - shape->pad_top, x = kw * shape->dilation_w - shape->pad_left;
            int64_t dy = floor_div(y, shape->conv_stride_h), dx = floor_div(x, shape->conv_stride_w);
            bool is_first = kh == 0 && kw == 0;
            geometry->dy_min = is_first ? dy : min64(geometry->dy_min, dy);
            geometry->dy_max = is_first ? dy : max64(geometry->dy_max, dy);
            geometry->dx_min = is_first ? dx : min64(geometry->dx_min, dx);
            geometry->dx_max = is_first ? dx : max64(geometry->dx_max, dx);
            geometry->taps[kh * shape->kw + kw] = (Tap){
                find_phase(geometry, y - dy * shape->conv_stride_h, x - dx * shape->conv_stride_w), dy, dx};
        }
}

/* A pitch at which the zero columns left of a row are those right of the row before. */
static void choose_pitch(Geometry *geometry) {
    geometry->guard = max64(0, -geometry->dx_min);
    geometry->pitch = geometry->out_width;
    for (int i = 0; i < geometry->phase_count; i++) {
        Phase *phase = &geometry->phases[i];
        int64_t last = geometry->out_width + geometry->dx_max; /* columns up to here are read */
        int64_t columns = phase->x < geometry->source.width
                              ? ceil_div(geometry->source.width - phase->x, geometry->conv_stride_w)
                              : 0;
        phase->width = max64(0, min64(columns, last));
        int64_t border = max64(geometry->guard, last - phase->width);
        geometry->pitch = max64(geometry->pitch, phase->width + border);
    }
}

/* A pointwise layer sees no neighbours: rows, and then images, are one long row where memory allows. */
static void merge_axes(Geometry *geometry) {
    Source *source = &geometry->source;
    Sink *sink = &geometry->sink;
    if (source->stride_h == source->width * source->stride_w &&
        sink->stride_h == source->width * sink->stride_w) {
        source->width *= source->height;
        source->height = 1;
    }
    if (source->height == 1 && source->width == 1) {
        source->width = source->batch;
        source->stride_w = source->stride_b;
        sink->stride_w = sink->stride_b;
        source->batch = 1;
    }
    geometry->out_height = source->height;
    geometry->out_width = source->width;
}

static void cut_jobs(Geometry *geometry, const Layer *layer, int cpu_threads) {
    int64_t width = geometry->out_width;
    geometry->pieces = 1;
    if (geometry->is_pointwise && !layer->is_im2col && width > PIECE_POSITIONS) {
        geometry->pieces = ceil_div(width, PIECE_POSITIONS);
        geometry->pitch = ceil_div(ceil_div(width, geometry->pieces), 16) * 16;
        geometry->pieces = ceil_div(width, geometry->pitch);
    }
    int64_t batch = geometry->source.batch, per_image = geometry->out_height * geometry->pieces;
    bool stays_in_image = !geometry->is_pointwise || layer->is_im2col;
    int64_t positions = wanted_positions(layer);
    int64_t available = stays_in_image ? per_image : per_image * batch;
    int64_t rows = max64(1, min64(available, positions / geometry->pitch));
    /* Enough jobs for every thread, as long as they do not become tiny. */
    int64_t others = stays_in_image ? batch * layer->shape.groups : layer->shape.groups;
    int64_t wanted = cpu_threads > 1 ? ceil_div(JOBS_PER_THREAD * (int64_t)cpu_threads, others) : 1;
    int64_t least = max64(1, ceil_div(LEAST_SHARE_POSITIONS, geometry->pitch));
    rows = max64(min64(rows, least), min64(rows, ceil_div(available, wanted)));
    rows = ceil_div(available, ceil_div(available, rows)); /* evenly */
    geometry->rows = batch * per_image;
    geometry->rows_per_job = rows;
    geometry->jobs_per_image = stays_in_image ? ceil_div(per_image, rows) : 0;
    geometry->jobs = stays_in_image ? batch * geometry->jobs_per_image : ceil_div(geometry->rows, rows);
}

bool geometry_make(Geometry *geometry, const Layer *layer, const Source *source, const Sink *sink,
                   int cpu_threads) {
    const ConvShape *shape = &layer->shape;
    *geometry = (Geometry){.source = *source,
                           .sink = *sink,
                           .out_height = output_height(shape, source),
                           .out_width = output_width(shape, source),
                           .conv_stride_h = shape->conv_stride_h,
                           .conv_stride_w = shape->conv_stride_w};
    bool is_padded = shape->pad_top || shape->pad_bottom || shape->pad_left || shape->pad_right;
    geometry->is_pointwise = layer->is_im2col || (layer->taps == 1 && !is_padded);
    geometry->taps = calloc((size_t)layer->taps, sizeof *geometry->taps);
    geometry->phases = calloc((size_t)layer->taps, sizeof *geometry->phases);
    if (!geometry->taps || !geometry->phases) {
        geometry_release(geometry);
        return false;
    }
    if (layer->is_im2col) {
        geometry->phases[geometry->phase_count++] = (Phase){.width = geometry->out_width};
        geometry->pitch = geometry->out_width;
    } else {
        if (geometry->is_pointwise && shape->conv_stride_h == 1 && shape->conv_stride_w == 1)
            merge_axes(geometry);
        place_taps(geometry, shape);
        choose_pitch(geometry);
    }
    cut_jobs(geometry, layer, cpu_threads);
    geometry->stage_rows = geometry->rows_per_job + geometry->dy_max - geometry->dy_min;
    int64_t positions = geometry->guard + geometry->stage_rows * geometry->pitch;
    geometry->track_stride = ceil_div(positions, 64) * 64 + TRACK_SKEW;
    return true;
}

void geometry_release(Geometry *geometry) {
    free(geometry->taps);
    free(geometry->phases);
}

Row geometry_row(const Geometry *geometry, int64_t row) {
    int64_t piece = row % geometry->pieces, y = row / geometry->pieces, x = piece * geometry->pitch;
    int64_t left = geometry->out_width - x;
    return (Row){.image = y / geometry->out_height,
                 .y = y % geometry->out_height,
                 .x = x,
                 .length = geometry->pieces > 1 ? min64(left, geometry->pitch) : left};
}

void geometry_job(const Geometry *geometry, int64_t job, int64_t *first, int64_t *count) {
    int64_t end;
    if (geometry->jobs_per_image) {
        int64_t per_image = geometry->out_height * geometry->pieces;
        int64_t image = job / geometry->jobs_per_image, part = job % geometry->jobs_per_image;
        *first = image * per_image + part * geometry->rows_per_job;
        end = min64(*first + geometry->rows_per_job, (image + 1) * per_image);
    } else {
        *first = job * geometry->rows_per_job;
        end = min64(*first + geometry->rows_per_job, geometry->rows);
    }
    *count = end - *first;
}
