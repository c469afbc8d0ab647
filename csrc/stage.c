#include "stage.h"

#include <string.h>

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Input rows that an im2col job needs, whether they exist or not. */
static int64_t raw_rows(const Layer *layer, const Geometry *geometry) {
    const ConvShape *shape = &layer->shape;
    return (geometry->rows_per_job - 1) * shape->stride_h + (shape->kh - 1) * shape->dilation_h + 1;
}

size_t stage_bytes(const Layer *layer, const Geometry *geometry) {
    return (size_t)(layer->channels * geometry->phase_count * geometry->stride);
}

size_t stage_raw_bytes(const Layer *layer, const Geometry *geometry) {
    if (!layer->is_im2col)
        return 0;
    return (size_t)(layer->shape.c * raw_rows(layer, geometry) * geometry->source.width + 64);
}

/* ---- rows of pixels ---- */

/* A run of input pixels and where their bytes go; count 0 where the row is outside the image. */
typedef struct {
    int64_t from; /* element offset of channel 0 of the group */
    int64_t stride, count;
    int64_t to; /* in the stream */
} PixelRun;

static PixelRun pixel_run(const StageArguments *stage, int phase, int64_t row) {
    const Geometry *geometry = stage->geometry;
    const Source *source = &geometry->source;
    PixelRun run = {.stride = geometry->stride_w * source->stride_w,
                    .to = geometry->guard + row * geometry->pitch};
    if (geometry->is_pointwise) {
        Row at = geometry_row(geometry, stage->first_row + row);
        run.from =
            at.image * source->stride_b + at.y * geometry->stride_h * source->stride_h + at.x * run.stride;
        run.count = at.length;
    } else {
        const Phase *of = &geometry->phases[phase];
        Row at = geometry_row(geometry, stage->first_row);
        int64_t y = (at.y + geometry->dy_min + row) * geometry->stride_h + of->y;
        run.from = at.image * source->stride_b + y * source->stride_h + of->x * source->stride_w;
        run.count = y >= 0 && y < source->height ? of->width : 0;
    }
    run.from += stage->group * stage->layer->shape.c * source->stride_c;
    return run;
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

/* Bytes of channels first..end-1 for one run; channel c goes to to[(c - first) * channel_stride]. */
static void stage_run(const StageArguments *stage, const PixelRun *run, int64_t first, int64_t end,
                      uint8_t *to, int64_t channel_stride, Seen *seen) {
    const Source *source = &stage->geometry->source;
    Quantiser quantiser = {source->inverse_scale, stage->layer->rule.is_signed};
    int64_t at = run->from + first * source->stride_c;
    if (source->is_float) {
        const float *from = (const float *)source->data + at;
        if (has_channels_last(source, run->stride))
            stage->ops->quantise_pixels(from, run->stride, run->count, end - first, &quantiser, to,
                                        channel_stride, seen);
        else
            for (int64_t c = 0; c < end - first; c++)
                stage->ops->quantise_row(from + c * source->stride_c, run->stride, run->count, &quantiser,
                                         to + c * channel_stride, seen);
    } else {
        const uint8_t *from = (const uint8_t *)source->data + at;
        if (has_channels_last(source, run->stride))
            stage->ops->transpose_pixels(from, run->stride, run->count, end - first, to, channel_stride);
        else
            for (int64_t c = 0; c < end - first; c++)
                copy_row(from + c * source->stride_c, run->stride, run->count, to + c * channel_stride);
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
    int64_t read = (stage->rows - 1) * shape->stride_h + (shape->kh - 1) * shape->dilation_h + 1;
    for (int64_t row = 0; row < read; row++) {
        int64_t y = at.y * shape->stride_h - shape->pad_top + row;
        if (y < 0 || y >= source->height)
            continue;
        PixelRun run = {.from = at.image * source->stride_b + y * source->stride_h +
                                stage->group * shape->c * source->stride_c,
                        .stride = source->stride_w,
                        .count = width};
        stage_run(stage, &run, first, end, to + row * width, rows * width, seen);
    }
}

void stage_im2col(const StageArguments *stage, int64_t first, int64_t end) {
    const Geometry *geometry = stage->geometry;
    const ConvShape *shape = &stage->layer->shape;
    int64_t rows = raw_rows(stage->layer, geometry), width = geometry->source.width;
    for (int64_t k = first; k < end; k++) {
        uint8_t *to = staged(stage, k, 0);
        memset(to, 0, (size_t)geometry->stride);
        int64_t c = k / (shape->kh * shape->kw), i = k / shape->kw % shape->kh, j = k % shape->kw;
        for (int64_t row = 0; row < stage->rows; row++, to += geometry->pitch) {
            const uint8_t *from =
                stage->raw + (c * rows + row * shape->stride_h + i * shape->dilation_h) * width;
            int64_t x = j * shape->dilation_w - shape->pad_left;
            for (int64_t p = 0; p < geometry->out_width; p++, x += shape->stride_w)
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
    bool has_gaps = !geometry->is_pointwise || geometry->chunks > 1;
    for (int phase = 0; phase < geometry->phase_count; phase++) {
        for (int64_t c = first; c < end; c++) {
            uint8_t *to = staged(stage, c, phase);
            int64_t from = has_gaps ? 0 : filled;
            memset(to + from, 0, (size_t)(geometry->stride - from));
        }
        for (int64_t row = 0; row < rows; row++) {
            PixelRun run = pixel_run(stage, phase, row);
            if (run.count)
                stage_run(stage, &run, first, end, staged(stage, first, phase) + run.to,
                          geometry->phase_count * geometry->stride, seen);
        }
    }
}

/* ---- counting ----
 *
 * A tap meets every staged pixel but those rows and columns that would belong to outputs beyond the edge. So:
 * count all pixels once, count the few rows and columns near the edges that some tap misses, and
 * take them off tap by tap: all - missed rows - missed columns + where both cross.
 */

enum { MAX_EDGES = 6 }; /* rows, and columns; more are counted tap by tap */

typedef struct {
    int32_t counts[MAX_TALLY];
} Counts;

/* Lines of one phase that some tap misses. */
typedef struct {
    int64_t at[MAX_EDGES];
    int count;
    bool is_too_many;
} Edges;

static void add_edges(Edges *edges, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i++) {
        if (edges->count == MAX_EDGES) {
            edges->is_too_many = true;
            return;
        }
        edges->at[edges->count++] = i;
    }
}

/* Of the lines first..end-1: those below shift_max, and those from outputs + shift_min on. */
static Edges find_edges(int64_t first, int64_t end, int64_t shift_min, int64_t shift_max, int64_t outputs) {
    Edges edges = {.count = 0};
    int64_t low = max64(first, min64(end, shift_max)), high = max64(low, min64(end, outputs + shift_min));
    add_edges(&edges, first, low);
    add_edges(&edges, high, end);
    return edges;
}

static bool misses(int64_t line, int64_t shift, int64_t outputs) {
    return line - shift < 0 || line - shift >= outputs;
}

/* What count_slot works on: the channels of one slot in one phase, at column 0 of row `first_row`. */
typedef struct {
    const StageArguments *stage;
    const uint8_t *channel[MAX_THREADS]; /* NULL: padding */
    int phase;
    int64_t first_row, own_first, own_end; /* phase rows: staged from; counted by this job */
    const int32_t *weights;                /* of the first tap */
    int64_t weights_per_tap;
} SlotArguments;

static void count_bytes(const SlotArguments *slot, int64_t from, int64_t count, Counts *counts) {
    const SlotRule *rule = &slot->stage->layer->rule;
    const uint8_t *channel[MAX_THREADS];
    for (int t = 0; t < rule->threads; t++)
        channel[t] = slot->channel[t] ? slot->channel[t] + from : NULL;
    slot->stage->ops->count(channel, count, rule->threads, rule->is_signed, counts->counts);
}

/* Count one column of the owned rows, gathered into a short stream first. */
static void count_column(const SlotArguments *slot, int64_t column, Counts *counts) {
    const SlotRule *rule = &slot->stage->layer->rule;
    int64_t pitch = slot->stage->geometry->pitch;
    for (int64_t row = slot->own_first; row < slot->own_end; row += STREAM) {
        uint8_t bytes[MAX_THREADS][STREAM];
        const uint8_t *channel[MAX_THREADS];
        int64_t rows = min64(STREAM, slot->own_end - row);
        for (int t = 0; t < rule->threads; t++) {
            channel[t] = slot->channel[t] ? bytes[t] : NULL;
            for (int64_t i = 0; slot->channel[t] && i < rows; i++)
                bytes[t][i] = slot->channel[t][(row + i - slot->first_row) * pitch + column];
        }
        slot->stage->ops->count(channel, rows, rule->threads, rule->is_signed, counts->counts);
    }
}

static void clear(Counts *counts, int length) {
    memset(counts->counts, 0, (size_t)length * sizeof *counts->counts);
}

static void add_counts(Counts *to, const Counts *from, int sign, int length) {
    for (int i = 0; i < length; i++)
        to->counts[i] += sign * from->counts[i];
}

static void tally_tap(const SlotArguments *slot, int64_t tap, Counts *counts, Tally *tally) {
    const SlotRule *rule = &slot->stage->layer->rule;
    tally_spread(counts->counts, rule->threads);
    slot->stage->ops->tally(tally, counts->counts, slot->weights + tap * slot->weights_per_tap, rule);
}

/* The plain way, for kernels that reach far beyond the edges: every tap counts its own pixels. */
static void count_tap_by_tap(const SlotArguments *slot, Tally *tally) {
    const Geometry *geometry = slot->stage->geometry;
    for (int64_t tap = 0; tap < slot->stage->layer->taps; tap++) {
        const Tap *at = &geometry->taps[tap];
        if (at->phase != slot->phase)
            continue;
        Counts counts = {{0}}; /* rare enough to be cleared whole */
        int64_t column = max64(0, at->dx);
        int64_t columns = min64(geometry->phases[slot->phase].width, geometry->out_width + at->dx) - column;
        for (int64_t row = slot->own_first; row < slot->own_end && columns > 0; row++)
            if (!misses(row, at->dy, geometry->out_height))
                count_bytes(slot, (row - slot->first_row) * geometry->pitch + column, columns, &counts);
        tally_tap(slot, tap, &counts, tally);
    }
}

static void count_by_edges(const SlotArguments *slot, const Edges *rows, const Edges *columns, Tally *tally) {
    const Geometry *geometry = slot->stage->geometry;
    int64_t pitch = geometry->pitch, width = geometry->phases[slot->phase].width;
    int length = tally_length(slot->stage->layer->rule.threads);
    Counts all, row_counts[MAX_EDGES], column_counts[MAX_EDGES], crossings[MAX_EDGES][MAX_EDGES];
    clear(&all, length);
    count_bytes(slot, (slot->own_first - slot->first_row) * pitch, (slot->own_end - slot->own_first) * pitch,
                &all);
    for (int i = 0; i < rows->count; i++) {
        int64_t row = (rows->at[i] - slot->first_row) * pitch;
        clear(&row_counts[i], length);
        count_bytes(slot, row, width, &row_counts[i]);
        for (int j = 0; j < columns->count; j++) {
            clear(&crossings[i][j], length);
            count_bytes(slot, row + columns->at[j], 1, &crossings[i][j]);
        }
    }
    for (int j = 0; j < columns->count; j++) {
        clear(&column_counts[j], length);
        count_column(slot, columns->at[j], &column_counts[j]);
    }
    for (int64_t tap = 0; tap < slot->stage->layer->taps; tap++) {
        const Tap *at = &geometry->taps[tap];
        if (at->phase != slot->phase)
            continue;
        Counts counts;
        memcpy(counts.counts, all.counts, (size_t)length * sizeof *counts.counts);
        for (int j = 0; j < columns->count; j++)
            if (misses(columns->at[j], at->dx, geometry->out_width))
                add_counts(&counts, &column_counts[j], -1, length);
        for (int i = 0; i < rows->count; i++) {
            if (!misses(rows->at[i], at->dy, geometry->out_height))
                continue;
            add_counts(&counts, &row_counts[i], -1, length);
            for (int j = 0; j < columns->count; j++)
                if (misses(columns->at[j], at->dx, geometry->out_width))
                    add_counts(&counts, &crossings[i][j], 1, length);
        }
        tally_tap(slot, tap, &counts, tally);
    }
}

static void count_slot(SlotArguments *slot, Tally *tally) {
    const Geometry *geometry = slot->stage->geometry;
    if (geometry->is_pointwise) {
        Counts counts;
        clear(&counts, tally_length(slot->stage->layer->rule.threads));
        count_bytes(slot, 0, slot->stage->rows * geometry->pitch, &counts);
        tally_tap(slot, 0, &counts, tally);
        return;
    }
    Row at = geometry_row(geometry, slot->stage->first_row);
    const Phase *phase = &geometry->phases[slot->phase];
    int64_t phase_rows =
        phase->y < geometry->source.height
            ? (geometry->source.height - phase->y + geometry->stride_h - 1) / geometry->stride_h
            : 0;
    /* The rows between this job's first and the next job's first are its own; the last takes the rest. */
    bool is_last = at.y + slot->stage->rows == geometry->out_height;
    slot->first_row = at.y + geometry->dy_min;
    slot->own_first = max64(0, slot->first_row);
    slot->own_end = slot->first_row + slot->stage->rows + (is_last ? geometry->dy_max - geometry->dy_min : 0);
    slot->own_end = max64(slot->own_first, min64(slot->own_end, phase_rows));
    Edges rows =
        find_edges(slot->own_first, slot->own_end, geometry->dy_min, geometry->dy_max, geometry->out_height);
    Edges columns = find_edges(0, phase->width, geometry->dx_min, geometry->dx_max, geometry->out_width);
    if (rows.is_too_many || columns.is_too_many)
        count_tap_by_tap(slot, tally);
    else
        count_by_edges(slot, &rows, &columns, tally);
}

void count_quads(const StageArguments *stage, int64_t first, int64_t end, Tally *tally) {
    const Layer *layer = stage->layer;
    int threads = layer->rule.threads, per_quad = slots_per_quad(&layer->rule),
        length = tally_length(threads);
    for (int64_t quad = first; quad < end; quad++)
        for (int slot = 0; slot < per_quad; slot++)
            for (int phase = 0; phase < stage->geometry->phase_count; phase++) {
                const int32_t *channels =
                    layer->channel_of + (stage->group * layer->quads + quad) * QUAD + slot * threads;
                SlotArguments arguments = {
                    .stage = stage,
                    .phase = phase,
                    .weights =
                        layer->tallies +
                        ((stage->group * layer->taps * layer->quads + quad) * per_quad + slot) * length,
                    .weights_per_tap = layer->quads * per_quad * length};
                for (int t = 0; t < threads; t++)
                    arguments.channel[t] =
                        channels[t] < 0 ? NULL : staged(stage, channels[t], phase) + stage->geometry->guard;
                count_slot(&arguments, tally);
            }
}
