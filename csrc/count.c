#include "count.h"

#include <stdlib.h>
#include <string.h>

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* ---- regions ---- */

static void add_edges(Edges *edges, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i++) {
        if (edges->count == MAX_EDGES) {
            edges->is_too_many = true;
            return;
        }
        edges->at[edges->count++] = i;
    }
}

/* Of the lines 0..end-1: those below shift_max, and those from outputs + shift_min on. */
static Edges find_edges(int64_t end, int64_t shift_min, int64_t shift_max, int64_t outputs) {
    Edges edges = {.count = 0};
    int64_t low = max64(0, min64(end, shift_max)), high = max64(low, min64(end, outputs + shift_min));
    add_edges(&edges, 0, low);
    add_edges(&edges, high, end);
    return edges;
}

static bool misses(int64_t line, int64_t shift, int64_t outputs) {
    return line - shift < 0 || line - shift >= outputs;
}

static PhaseRegions find_regions(const Layer *layer, const Geometry *geometry, int phase) {
    PhaseRegions of = {.regions = 1};
    if (geometry->is_pointwise)
        return of;
    const Phase *at = &geometry->phases[phase];
    int64_t height = geometry->source.height;
    of.rows = at->y < height ? (height - at->y + geometry->stride_h - 1) / geometry->stride_h : 0;
    of.row_edges = find_edges(of.rows, geometry->dy_min, geometry->dy_max, geometry->out_height);
    of.column_edges = find_edges(at->width, geometry->dx_min, geometry->dx_max, geometry->out_width);
    of.is_tap_by_tap = of.row_edges.is_too_many || of.column_edges.is_too_many;
    if (of.is_tap_by_tap)
        of.row_edges.count = of.column_edges.count = 0;
    of.regions = of.is_tap_by_tap ? layer->taps : (1 + of.row_edges.count) * (1 + of.column_edges.count);
    return of;
}

/* Mark the positions of a stream, row-major from column 0, that lie in one column. */
static void mark_column(uint64_t *mask, int64_t blocks, int64_t column, int64_t pitch) {
    for (int64_t position = column; position < blocks * STREAM; position += pitch)
        mask[position / STREAM] |= UINT64_C(1) << position % STREAM;
}

bool regions_make(Regions *regions, const Layer *layer, const Geometry *geometry) {
    *regions = (Regions){.phase_count = geometry->phase_count,
                         .blocks = (geometry->stage_rows * geometry->pitch + STREAM - 1) / STREAM};
    regions->phases = calloc((size_t)geometry->phase_count, sizeof *regions->phases);
    if (!regions->phases)
        return false;
    int64_t columns = 0;
    for (int phase = 0; phase < geometry->phase_count; phase++) {
        PhaseRegions *of = &regions->phases[phase];
        *of = find_regions(layer, geometry, phase);
        of->first_region = regions->regions;
        regions->regions += of->regions;
        columns += of->column_edges.count;
    }
    uint64_t *mask = regions->masks = calloc((size_t)(columns * regions->blocks) + 1, sizeof *mask);
    for (int phase = 0; mask && phase < geometry->phase_count; phase++) {
        PhaseRegions *of = &regions->phases[phase];
        of->masks = mask;
        for (int j = 0; j < of->column_edges.count; j++, mask += regions->blocks)
            mark_column(mask, regions->blocks, of->column_edges.at[j], geometry->pitch);
    }
    return regions->masks != NULL;
}

void regions_release(Regions *regions) {
    free(regions->phases);
    free(regions->masks);
}

int64_t counts_length(const Regions *regions, const Layer *layer) {
    return layer->shape.groups * layer->quads * slots_per_quad(&layer->rule) * regions->regions *
           activations_length(layer->rule.threads);
}

/* ---- counting ---- */

/* The channels of one slot in one phase, at column 0 of the job's first phase row. */
typedef struct {
    const StageArguments *stage;
    const Regions *regions;
    const uint8_t *channel[MAX_THREADS]; /* NULL: padding */
    int phase;
    int64_t *counts; /* of the phase's first region */
} SlotArguments;

/* Add `count` bytes to one region, or to a row of regions: all of them, then those in each column edge. */
static void count_bytes(const SlotArguments *slot, int64_t from, int64_t count, int64_t region,
                        bool by_columns) {
    const SlotRule *rule = &slot->stage->layer->rule;
    const PhaseRegions *of = &slot->regions->phases[slot->phase];
    CountArguments arguments = {.count = count,
                                .threads = rule->threads,
                                .is_signed = rule->is_signed,
                                .masks = of->masks,
                                .columns = by_columns ? of->column_edges.count : 0,
                                .mask_stride = slot->regions->blocks,
                                .counts = slot->counts + region * activations_length(rule->threads)};
    for (int t = 0; t < rule->threads; t++)
        arguments.channel[t] = slot->channel[t] ? slot->channel[t] + from : NULL;
    slot->stage->ops->count(&arguments);
}

/* The plain way, for kernels that reach far beyond the edges: every tap counts its own pixels. */
static void count_tap_by_tap(const SlotArguments *slot, int64_t first_row, int64_t own_first,
                             int64_t own_end) {
    const Geometry *geometry = slot->stage->geometry;
    for (int64_t tap = 0; tap < slot->stage->layer->taps; tap++) {
        const Tap *at = &geometry->taps[tap];
        if (at->phase != slot->phase)
            continue;
        int64_t column = max64(0, at->dx);
        int64_t columns = min64(geometry->phases[slot->phase].width, geometry->out_width + at->dx) - column;
        for (int64_t row = own_first; row < own_end && columns > 0; row++)
            if (!misses(row, at->dy, geometry->out_height))
                count_bytes(slot, (row - first_row) * geometry->pitch + column, columns, tap, false);
    }
}

static void count_slot(const SlotArguments *slot) {
    const StageArguments *stage = slot->stage;
    const Geometry *geometry = stage->geometry;
    int64_t pitch = geometry->pitch;
    if (geometry->is_pointwise) {
        count_bytes(slot, 0, stage->rows * pitch, 0, false);
        return;
    }
    const PhaseRegions *of = &slot->regions->phases[slot->phase];
    int64_t y = geometry_row(geometry, stage->first_row).y;
    /* The rows between this job's first and the next job's first are its own; the last takes the rest. */
    bool is_last = y + stage->rows == geometry->out_height;
    int64_t first_row = y + geometry->dy_min, own_first = max64(0, first_row);
    int64_t own_end = first_row + stage->rows + (is_last ? geometry->dy_max - geometry->dy_min : 0);
    own_end = max64(own_first, min64(own_end, of->rows));
    if (of->is_tap_by_tap) {
        count_tap_by_tap(slot, first_row, own_first, own_end);
        return;
    }
    count_bytes(slot, (own_first - first_row) * pitch, (own_end - own_first) * pitch, 0, true);
    for (int i = 0; i < of->row_edges.count; i++) {
        int64_t row = of->row_edges.at[i];
        if (row >= own_first && row < own_end)
            count_bytes(slot, (row - first_row) * pitch, geometry->phases[slot->phase].width,
                        (i + 1) * (1 + of->column_edges.count), true);
    }
}

void count_quads(const StageArguments *stage, const Regions *regions, int64_t first, int64_t end,
                 int64_t *counts) {
    const Layer *layer = stage->layer;
    int threads = layer->rule.threads, per_quad = slots_per_quad(&layer->rule);
    int64_t length = activations_length(threads);
    for (int64_t i = first * per_quad; i < end * per_quad; i++) {
        int64_t in_layer = stage->group * layer->quads * per_quad + i;
        const int32_t *channels = layer->channel_of + in_layer * threads;
        for (int phase = 0; phase < regions->phase_count; phase++) {
            int64_t region = in_layer * regions->regions + regions->phases[phase].first_region;
            SlotArguments slot = {
                .stage = stage, .regions = regions, .phase = phase, .counts = counts + region * length};
            for (int t = 0; t < threads; t++)
                slot.channel[t] =
                    channels[t] < 0 ? NULL : staged(stage, channels[t], phase) + stage->geometry->guard;
            count_slot(&slot);
        }
    }
}

/* ---- folding ---- */

/* How often a tap sees what a region holds: 1, 0 or -1. */
static int sign_of(const Geometry *geometry, const PhaseRegions *of, int64_t region, int64_t tap) {
    if (geometry->is_pointwise || of->is_tap_by_tap)
        return region == tap;
    const Tap *at = &geometry->taps[tap];
    int64_t columns = 1 + of->column_edges.count, i = region / columns, j = region % columns;
    if (i && !misses(of->row_edges.at[i - 1], at->dy, geometry->out_height))
        return 0;
    if (j && !misses(of->column_edges.at[j - 1], at->dx, geometry->out_width))
        return 0;
    return !i == !j ? 1 : -1;
}

static void add_weights(int32_t *to, const int32_t *weights, int sign, int length) {
    for (int i = 0; i < length; i++)
        to[i] += sign * weights[i];
}

/* From (n, n by the wide thread) to (n, v, n by the wide thread). */
static void add_counts(int64_t *to, const int64_t *counts, int threads) {
    int half = 1 << (threads - 1), subsets = subset_count(threads);
    for (int set = 0; set < subsets; set++)
        to[set] += counts[set];
    for (int t = 0; t < threads; t++)
        for (int rest = 0; rest < half; rest++) {
            int64_t count = counts[subsets + t * half + rest];
            to[subsets + with_thread(t, rest)] += count;
            to[2 * subsets + t * half + rest] += count;
        }
}

/* One region: counts of all its slots, with the weights of all taps that see it. */
static void fold_region(const VectorOps *ops, const Layer *layer, const int8_t *signs, int64_t region,
                        int64_t regions, const int64_t *const *counts, int parts, Tally *tally) {
    int threads = layer->rule.threads, length = tally_length(threads);
    int64_t slots = layer->quads * slots_per_quad(&layer->rule), counted = activations_length(threads);
    for (int64_t group = 0; group < layer->shape.groups; group++)
        for (int64_t slot = 0; slot < slots; slot++) {
            int64_t activations[MAX_TALLY] = {0};
            int32_t weights[MAX_TALLY] = {0};
            for (int part = 0; part < parts; part++)
                add_counts(activations, counts[part] + ((group * slots + slot) * regions + region) * counted,
                           threads);
            for (int64_t tap = 0; tap < layer->taps; tap++)
                if (signs[tap])
                    add_weights(weights,
                                layer->tallies + ((group * layer->taps + tap) * slots + slot) * length,
                                signs[tap], length);
            ops->tally(tally, activations, weights, &layer->rule);
        }
}

bool count_fold(const VectorOps *ops, const Layer *layer, const Geometry *geometry, const Regions *regions,
                const int64_t *const *counts, int parts, Tally *tally) {
    int8_t *signs = malloc((size_t)layer->taps);
    for (int phase = 0; signs && phase < regions->phase_count; phase++) {
        const PhaseRegions *of = &regions->phases[phase];
        for (int64_t region = 0; region < of->regions; region++) {
            bool is_seen = false;
            for (int64_t tap = 0; tap < layer->taps; tap++) {
                bool is_here = geometry->is_pointwise || geometry->taps[tap].phase == phase;
                signs[tap] = is_here ? (int8_t)sign_of(geometry, of, region, tap) : 0;
                is_seen |= signs[tap] != 0;
            }
            if (is_seen)
                fold_region(ops, layer, signs, of->first_region + region, regions->regions, counts, parts,
                            tally);
        }
    }
    free(signs);
    return signs != NULL;
}
