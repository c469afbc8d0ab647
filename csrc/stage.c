#include "stage.h"

#include <string.h>

/* Input rows that an im2col job needs, whether they exist or not. */
static int64_t raw_rows(const Layer *layer, const Geometry *geometry) {
    const ConvShape *shape = &layer->shape;
    return (geometry->rows_per_job - 1) * shape->conv_stride_h + (shape->kh - 1) * shape->dilation_h + 1;
}

size_t stage_bytes(const Layer *layer, const Geometry *geometry) {
    return (size_t)(layer->channels * geometry->phase_count * geometry->track_stride);
}

size_t stage_raw_bytes(const Layer *layer, const Geometry *geometry) {
    if (!layer->is_im2col)
        return 0;
    return (size_t)(layer->shape.c * raw_rows(layer, geometry) * geometry->source.width + 64);
}

/* ---- rows of pixels ---- */

/* A span of input pixels and where their bytes go; count 0 where the row is outside the image. */
typedef struct {
    int64_t from; /* element offset of channel 0 of the group */
    int64_t stride, count;
    int64_t to; /* in the track */
} PixelSpan;

static PixelSpan pixel_span(const StageArguments *stage, int phase, int64_t row) {
    const Geometry *geometry = stage->geometry;
    const Source *source = &geometry->source;
    PixelSpan span = {.stride = geometry->conv_stride_w * source->stride_w,
                      .to = geometry->guard + row * geometry->pitch};
    if (geometry->is_pointwise) {
        Row at = geometry_row(geometry, stage->first_row + row);
        span.from = at.image * source->stride_b + at.y * geometry->conv_stride_h * source->stride_h +
                    at.x * span.stride;
        span.count = at.length;
    } else {
        const Phase *of = &geometry->phases[phase];
        Row at = geometry_row(geometry, stage->first_row);
        int64_t y = (at.y + geometry->dy_min + row) * geometry->conv_stride_h + of->y;
        span.from = at.image * source->stride_b + y * source->stride_h + of->x * source->stride_w;
        span.count = y >= 0 && y < source->height ? of->width : 0;
    }
    span.from += stage->group * stage->layer->shape.c * source->stride_c;
    return span;
}

static bool has_channels_last(const Source *source, int64_t pixel_stride) {
    return source->stride_c == 1 && pixel_stride != 1;
}

static void copy_row(const uint8_t *from, int64_t stride, int64_t count, uint8_t *to) {
    if (stride == 1)
        memcpy(to, from, (size_t)count);
    else
        for (int64_t i = 0; i < count; i++)
            to[i] = from[i * stride];
}

/* Bytes of channels first..end-1 for one span; channel c goes to to[(c - first) * channel_stride]. */
static void stage_span(const StageArguments *stage, const PixelSpan *span, int64_t first, int64_t end,
                       uint8_t *to, int64_t channel_stride, Seen *seen) {
    const Source *source = &stage->geometry->source;
    Quantiser quantiser = {source->inverse_scale, stage->layer->rule.is_signed};
    int64_t at = span->from + first * source->stride_c;
    if (source->is_float) {
        const float *from = (const float *)source->data + at;
        if (has_channels_last(source, span->stride))
            stage->ops->quantise_pixels(from, span->stride, span->count, end - first, &quantiser, to,
                                        channel_stride, seen);
        else
            for (int64_t c = 0; c < end - first; c++)
                stage->ops->quantise_row(from + c * source->stride_c, span->stride, span->count, &quantiser,
                                         to + c * channel_stride, seen);
    } else {
        const uint8_t *from = (const uint8_t *)source->data + at;
        if (has_channels_last(source, span->stride))
            stage->ops->transpose_pixels(from, span->stride, span->count, end - first, to, channel_stride);
        else
            for (int64_t c = 0; c < end - first; c++)
                copy_row(from + c * source->stride_c, span->stride, span->count, to + c * channel_stride);
    }
}

/* The input rows below an im2col job: (channels, rows, width), zero outside the image. */
static void stage_raw(const StageArguments *stage, int64_t first, int64_t end, Seen *seen) {
    const ConvShape *shape = &stage->layer->shape;
    const Source *source = &stage->geometry->source;
    int64_t rows = raw_rows(stage->layer, stage->geometry), width = source->width;
    Row at = geometry_row(stage->geometry, stage->first_row);
    uint8_t *to = stage->raw + first * rows * width;
    memset(to, 0, (size_t)((end - first) * rows * width));
    int64_t read = (stage->rows - 1) * shape->conv_stride_h + (shape->kh - 1) * shape->dilation_h + 1;
    for (int64_t row = 0; row < read; row++) {
        int64_t y = at.y * shape->conv_stride_h - shape->pad_top + row;
        if (y < 0 || y >= source->height)
            continue;
        PixelSpan span = {.from = at.image * source->stride_b + y * source->stride_h +
                                  stage->group * shape->c * source->stride_c,
                          .stride = source->stride_w,
                          .count = width};
        stage_span(stage, &span, first, end, to + row * width, rows * width, seen);
    }
}

void stage_im2col(const StageArguments *stage, int64_t first, int64_t end) {
    const Geometry *geometry = stage->geometry;
    const ConvShape *shape = &stage->layer->shape;
    int64_t rows = raw_rows(stage->layer, geometry), width = geometry->source.width;
    for (int64_t k = first; k < end; k++) {
        uint8_t *to = staged(stage, k, 0);
        memset(to, 0, (size_t)geometry->track_stride);
        int64_t c = k / (shape->kh * shape->kw), i = k / shape->kw % shape->kh, j = k % shape->kw;
        for (int64_t row = 0; row < stage->rows; row++, to += geometry->pitch) {
            const uint8_t *from =
                stage->raw + (c * rows + row * shape->conv_stride_h + i * shape->dilation_h) * width;
            int64_t x = j * shape->dilation_w - shape->pad_left;
            for (int64_t p = 0; p < geometry->out_width; p++, x += shape->conv_stride_w)
                if (x >= 0 && x < width)
                    to[p] = from[x];
        }
    }
}

void stage_channels(const StageArguments *stage, int64_t first, int64_t end, Seen *seen) {
    if (stage->layer->is_im2col) {
        stage_raw(stage, first, end, seen);
        return;
    }
    const Geometry *geometry = stage->geometry;
    int64_t rows = stage->rows + geometry->dy_max - geometry->dy_min;
    int64_t filled = geometry->guard + rows * geometry->pitch;
    bool has_gaps = !geometry->is_pointwise || geometry->pieces > 1;
    for (int phase = 0; phase < geometry->phase_count; phase++) {
        for (int64_t c = first; c < end; c++) {
            uint8_t *to = staged(stage, c, phase);
            int64_t from = has_gaps ? 0 : filled;
            memset(to + from, 0, (size_t)(geometry->track_stride - from));
        }
        for (int64_t row = 0; row < rows; row++) {
            PixelSpan span = pixel_span(stage, phase, row);
            if (span.count)
                stage_span(stage, &span, first, end, staged(stage, first, phase) + span.to,
                           geometry->phase_count * geometry->track_stride, seen);
        }
    }
}
