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
    of.rows = at->y < height ? (height - at->y + geometry->conv_stride_h - 1) / geometry->conv_stride_h : 0;
    of.row_edges = find_edges(of.rows, geometry->dy_min, geometry->dy_max, geometry->out_height);
    of.column_edges = find_edges(at->width, geometry->dx_min, geometry->dx_max, geometry->out_width);
    of.is_tap_by_tap = of.row_edges.is_too_many || of.column_edges.is_too_many;
    if (of.is_tap_by_tap)
        of.row_edges.count = of.column_edges.count = 0;
    of.regions = of.is_tap_by_tap ? layer->taps : (1 + of.row_edges.count) * (1 + of.column_edges.count);
    return of;
}

/* Mark the positions of a track, row-major from column 0, that lie in one column. */
static void mark_column(uint64_t *mask, int64_t grains, int64_t column, int64_t pitch) {
    for (int64_t position = column; position < grains * GRAIN; position += pitch)
        mask[position / GRAIN] |= UINT64_C(1) << position % GRAIN;
}

bool regions_make(Regions *regions, const Layer *layer, const Geometry *geometry) {
    *regions = (Regions){.phase_count = geometry->phase_count,
                         .grains = (geometry->stage_rows * geometry->pitch + GRAIN - 1) / GRAIN};
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
    uint64_t *mask = regions->masks = calloc((size_t)(columns * regions->grains) + 1, sizeof *mask);
    for (int phase = 0; mask && phase < geometry->phase_count; phase++) {
        PhaseRegions *of = &regions->phases[phase];
        of->masks = mask;
        for (int j = 0; j < of->column_edges.count; j++, mask += regions->grains)
            mark_column(mask, regions->grains, of->column_edges.at[j], geometry->pitch);
    }
    return regions->masks != NULL;
}

void regions_release(Regions *regions) {
    free(regions->phases);
    free(regions->masks);
}

int64_t counts_length(const Regions *regions, const Layer *layer) {
    return layer->shape.groups * layer->quads * slots_per_quad(&layer->rule) * regions->regions *
           tally_length(layer->rule.threads, tally_kind(&layer->rule));
}

/* ---- counting ---- */

/* One phase of a job. */
typedef struct {
    const StageArguments *stage;
    const Regions *regions;
    int phase;
    int64_t first_row;          /* phase row at which the stage begins */
    int64_t own_first, own_end; /* phase rows that are this job's to count */
    int64_t first, end;         /* slots */
    int64_t *counts;            /* of the phase's first region in the first slot */
} Counting;

/* Add `count` bytes of every slot, from a place in phase row `row` on, to one region; or to a row of regions:
 * all of them, then those in each column edge. */
static void count_bytes(const Counting *counting, int64_t row, int64_t column, int64_t count, int64_t region,
                        bool by_columns) {
    const StageArguments *stage = counting->stage;
    const Layer *layer = stage->layer;
    const Geometry *geometry = stage->geometry;
    const SlotRule *rule = &layer->rule;
    const PhaseRegions *of = &counting->regions->phases[counting->phase];
    int64_t slots = layer->quads * slots_per_quad(rule),
            length = tally_length(rule->threads, tally_kind(rule));
    CountArguments arguments = {.rule = rule,
                                .slots = counting->end - counting->first,
                                .channel_of = layer->channel_of +
                                              (stage->group * slots + counting->first) * rule->threads,
                                .bytes = staged(stage, 0, counting->phase) + geometry->guard +
                                         (row - counting->first_row) * geometry->pitch + column,
                                .channel_stride = geometry->phase_count * geometry->track_stride,
                                .count = count,
                                .masks = of->masks,
                                .columns = by_columns ? of->column_edges.count : 0,
                                .mask_stride = counting->regions->grains,
                                .counts = counting->counts + region * length,
                                .counts_stride = counting->regions->regions * length};
    stage->ops->count(&arguments);
}

/* The plain way, for kernels that reach far beyond the edges: every tap counts its own pixels. */
static void count_tap_by_tap(const Counting *counting) {
    const Geometry *geometry = counting->stage->geometry;
    for (int64_t tap = 0; tap < counting->stage->layer->taps; tap++) {
        const Tap *at = &geometry->taps[tap];
        int64_t column = max64(0, at->dx);
        int64_t columns =
            min64(geometry->phases[counting->phase].width, geometry->out_width + at->dx) - column;
        if (at->phase != counting->phase || columns <= 0)
            continue;
        for (int64_t row = counting->own_first; row < counting->own_end; row++)
            if (!misses(row, at->dy, geometry->out_height))
                count_bytes(counting, row, column, columns, tap, false);
    }
}

static void count_by_edges(const Counting *counting) {
    const Geometry *geometry = counting->stage->geometry;
    const PhaseRegions *of = &counting->regions->phases[counting->phase];
    count_bytes(counting, counting->own_first, 0, (counting->own_end - counting->own_first) * geometry->pitch,
                0, true);
    for (int i = 0; i < of->row_edges.count; i++) {
        int64_t row = of->row_edges.at[i];
        if (row >= counting->own_first && row < counting->own_end)
            count_bytes(counting, row, 0, geometry->phases[counting->phase].width,
                        (i + 1) * (1 + of->column_edges.count), true);
    }
}

/* The rows between this job's first and the next job's first are its own; an image's last job takes the rest.
 */
static void find_own_rows(Counting *counting) {
    const StageArguments *stage = counting->stage;
    const Geometry *geometry = stage->geometry;
    int64_t y = geometry_row(geometry, stage->first_row).y,
            exist = counting->regions->phases[counting->phase].rows;
    bool is_last = y + stage->rows == geometry->out_height;
    counting->first_row = y + geometry->dy_min;
    counting->own_first = max64(0, counting->first_row);
    counting->own_end =
        counting->first_row + stage->rows + (is_last ? geometry->dy_max - geometry->dy_min : 0);
    counting->own_end = max64(counting->own_first, min64(counting->own_end, exist));
}

void count_quads(const StageArguments *stage, const Regions *regions, int64_t first, int64_t end,
                 int64_t *counts) {
    const Layer *layer = stage->layer;
    const SlotRule *rule = &layer->rule;
    int64_t per_quad = slots_per_quad(rule), length = tally_length(rule->threads, tally_kind(rule));
    for (int phase = 0; phase < regions->phase_count; phase++) {
        const PhaseRegions *of = &regions->phases[phase];
        Counting counting = {.stage = stage,
                             .regions = regions,
                             .phase = phase,
                             .first = first * per_quad,
                             .end = end * per_quad};
        int64_t in_layer = stage->group * layer->quads * per_quad + counting.first;
        counting.counts = counts + (in_layer * regions->regions + of->first_region) * length;
        if (stage->geometry->is_pointwise) {
            count_bytes(&counting, 0, 0, stage->rows * stage->geometry->pitch, 0, false);
            continue;
        }
        find_own_rows(&counting);
        if (of->is_tap_by_tap)
            count_tap_by_tap(&counting);
        else
            count_by_edges(&counting);
    }
}

/* ---- folding ---- */

/* Whether a tap's pixels are known from what a region holds, with the region's sign. */
static bool sees(const Geometry *geometry, const PhaseRegions *of, int phase, int64_t region, int64_t tap) {
    const Tap *at = &geometry->taps[tap];
    if (geometry->is_pointwise || of->is_tap_by_tap)
        return region == tap && at->phase == phase;
    int64_t columns = 1 + of->column_edges.count, i = region / columns, j = region % columns;
    return at->phase == phase && (i == 0 || misses(of->row_edges.at[i - 1], at->dy, geometry->out_height)) &&
           (j == 0 || misses(of->column_edges.at[j - 1], at->dx, geometry->out_width));
}

static int sign_of(const PhaseRegions *of, int64_t region) {
    int64_t columns = 1 + of->column_edges.count;
    return of->is_tap_by_tap || (region < columns) == (region % columns == 0) ? 1 : -1;
}

bool count_fold(const VectorOps *ops, const Layer *layer, const Geometry *geometry, const Regions *regions,
                const int64_t *const *counts, int workspaces, Tally *tally) {
    const SlotRule *rule = &layer->rule;
    int64_t length = tally_length(rule->threads, tally_kind(rule));
    int64_t slots = layer->quads * slots_per_quad(rule), per_slot = regions->regions * length;
    int64_t *taps = malloc((size_t)layer->taps * sizeof *taps);
    const int64_t **here = malloc((size_t)workspaces * sizeof *here);
    FoldArguments fold = {.rule = rule,
                          .slots = slots,
                          .counts = here,
                          .counts_stride = per_slot,
                          .workspaces = workspaces,
                          .tap_stride = slots * length,
                          .tap = taps,
                          .tally = tally};
    bool is_ready = taps && here;
    for (int phase = 0; is_ready && phase < regions->phase_count; phase++) {
        const PhaseRegions *of = &regions->phases[phase];
        for (int64_t region = 0; region < of->regions; region++) {
            fold.taps = 0;
            fold.sign = sign_of(of, region);
            for (int64_t tap = 0; tap < layer->taps; tap++)
                if (sees(geometry, of, phase, region, tap))
                    taps[fold.taps++] = tap;
            for (int64_t group = 0; fold.taps && group < layer->shape.groups; group++) {
                for (int i = 0; i < workspaces; i++)
                    here[i] = counts[i] + group * slots * per_slot + (of->first_region + region) * length;
                fold.weights = layer->tallies + group * layer->taps * slots * length;
                ops->fold(&fold);
            }
        }
    }
    free(taps);
    free(here);
    return is_ready;
}
