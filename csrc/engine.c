/* Run a layer: jobs of rows, each staged, packed, counted and multiplied; spread over threads. */
#define _GNU_SOURCE /* clock_gettime */
#include "engine.h"
#include "buffers.h"
#include "count.h"
#include "geometry.h"
#include "ninth_bit.h"
#include "stage.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- what all jobs share ---- */

typedef struct {
    const VectorOps *ops;
    const Layer *layer;
    Geometry geometry;
    PlaneMasks *masks;
    uint32_t *step_offset; /* (steps): positions from a tile's own to its operands */
    bool can_overflow;
    bool is_timed;
    bool count;
    Regions regions; /* if counted */

    pthread_mutex_t lock; /* over what follows */
    int64_t nanoseconds[TIMES];
    Seen seen;
    const char *ran_on;      /* see Outcome */
    struct Workspace *spare; /* workspaces that no job uses */
    bool is_out_of_memory;
} Shared;

/* Buffers of one job at a time. */
typedef struct Workspace {
    struct Workspace *next;
    uint8_t *stage, *raw;
    uint32_t *planes[2]; /* the second: what the ninth bit holds */
    uint16_t *flags;
    int32_t (*acc)[BLOCK][TILE]; /* (blocks, tiles) */
    int64_t *counts;             /* of all jobs that used this workspace */
    NinthBits ninth_bits;
} Workspace;

/* Tracks that are packed at a time. */
static int64_t tracks(const Shared *shared) {
    return shared->layer->chunk_quads * shared->geometry.phase_count;
}

static int64_t tiles_of(int64_t positions) {
    return (positions + TILE - 1) / TILE;
}

/* So many events of a chunk are corrected one by one. */
static int64_t events_per_chunk(const Shared *shared) {
    return tracks(shared) * shared->geometry.track_stride / POSITIONS_PER_EVENT + 1;
}

/* From a plane to the next, in 32-bit words. */
static int64_t plane_stride(const Shared *shared) {
    return tracks(shared) * words_per_quad(shared->layer) * shared->geometry.track_stride;
}

static void workspace_release(Workspace *workspace) {
    if (!workspace)
        return;
    buffer_give(workspace->stage);
    buffer_give(workspace->raw);
    buffer_give(workspace->planes[0]);
    buffer_give(workspace->planes[1]);
    buffer_give(workspace->flags);
    buffer_give(workspace->acc);
    buffer_give(workspace->counts);
    ninth_bits_release(&workspace->ninth_bits);
    free(workspace);
}

/* With room behind the last track: vectors are read whole. */
static void *allocate(size_t bytes) {
    return buffer_take(bytes + 64 * sizeof(uint32_t));
}

static Workspace *workspace_make(const Shared *shared) {
    const Geometry *geometry = &shared->geometry;
    Workspace *workspace = calloc(1, sizeof *workspace);
    if (!workspace)
        return NULL;
    size_t words = (size_t)(plane_stride(shared) * shared->layer->plane_count);
    workspace->stage = allocate(stage_bytes(shared->layer, geometry));
    workspace->raw = allocate(stage_raw_bytes(shared->layer, geometry));
    workspace->planes[0] = allocate(words * sizeof(uint32_t));
    int64_t tiles = tiles_of(geometry->rows_per_job * geometry->pitch);
    workspace->acc = allocate((size_t)(shared->layer->blocks * tiles) * sizeof *workspace->acc);
    bool is_complete = workspace->stage && workspace->raw && workspace->planes[0] && workspace->acc;
    if (shared->layer->has_contests) {
        workspace->flags = allocate((size_t)plane_stride(shared) * sizeof *workspace->flags);
        is_complete &= workspace->flags != NULL;
    }
    if (shared->count) {
        size_t bytes = (size_t)counts_length(&shared->regions, shared->layer) * sizeof *workspace->counts;
        workspace->counts = allocate(bytes);
        is_complete &= workspace->counts != NULL;
        if (workspace->counts)
            memset(workspace->counts, 0, bytes);
    }
    if (shared->can_overflow)
        is_complete &=
            ninth_bits_make(&workspace->ninth_bits, events_per_chunk(shared) * shared->layer->chunks);
    if (!is_complete) {
        workspace_release(workspace);
        return NULL;
    }
    return workspace;
}

static Workspace *workspace_take(Shared *shared) {
    pthread_mutex_lock(&shared->lock);
    Workspace *workspace = shared->spare;
    if (workspace)
        shared->spare = workspace->next;
    pthread_mutex_unlock(&shared->lock);
    return workspace ? workspace : workspace_make(shared);
}

static void workspace_give(Shared *shared, Workspace *workspace) {
    pthread_mutex_lock(&shared->lock);
    workspace->next = shared->spare;
    shared->spare = workspace;
    pthread_mutex_unlock(&shared->lock);
}

static void fail(Shared *shared) {
    pthread_mutex_lock(&shared->lock);
    shared->is_out_of_memory = true;
    pthread_mutex_unlock(&shared->lock);
}

/* ---- one job ---- */

typedef struct {
    Shared *shared;
    Workspace *workspace;
    int64_t group, first_row, rows;
    int64_t chunk, events_before; /* at work; events of the chunks before */
    bool has_excess; /* too many events in this chunk: the second planes are packed and multiplied, too */
} Job;

static StageArguments stage_of(const Job *job) {
    return (StageArguments){.ops = job->shared->ops,
                            .layer = job->shared->layer,
                            .geometry = &job->shared->geometry,
                            .group = job->group,
                            .first_row = job->first_row,
                            .rows = job->rows,
                            .stage = job->workspace->stage,
                            .raw = job->workspace->raw};
}

static void note_seen(Shared *shared, const Seen *seen) {
    if (!seen->nonfinite && !seen->negative)
        return;
    pthread_mutex_lock(&shared->lock);
    shared->seen.nonfinite |= seen->nonfinite;
    shared->seen.negative |= seen->negative;
    pthread_mutex_unlock(&shared->lock);
}

static void job_stage(const Job *job, int64_t first, int64_t end) {
    StageArguments stage = stage_of(job);
    Seen seen = {false, false};
    stage_channels(&stage, first, end, &seen);
    note_seen(job->shared, &seen);
}

static void job_im2col(const Job *job, int64_t first, int64_t end) {
    StageArguments stage = stage_of(job);
    stage_im2col(&stage, first, end);
}

static void job_count(const Job *job, int64_t first, int64_t end) {
    StageArguments stage = stage_of(job);
    count_quads(&stage, &job->shared->regions, first, end, job->workspace->counts);
}

/* Pack quads first..end-1 of the chunk, all phases. */
static void job_pack(const Job *job, int64_t first, int64_t end, bool is_excess) {
    const Shared *shared = job->shared;
    const Layer *layer = shared->layer;
    const Geometry *geometry = &shared->geometry;
    Workspace *workspace = job->workspace;
    StageArguments stage = stage_of(job);
    int bias = bias_of(&layer->format, layer->rule.is_signed);
    int64_t rows = job->rows + geometry->dy_max - geometry->dy_min;
    int64_t positions = (geometry->guard + rows * geometry->pitch + GRAIN - 1) / GRAIN * GRAIN;
    for (int phase = 0; phase < geometry->phase_count; phase++)
        for (int64_t quad = first; quad < end; quad++) {
            int64_t track = phase * layer->chunk_quads + quad;
            int64_t at = track * words_per_quad(layer) * geometry->track_stride;
            int64_t of_layer = job->chunk * layer->chunk_quads + quad;
            PackArguments pack = {.positions = positions,
                                  .rule = &layer->rule,
                                  .planes = shared->masks,
                                  .plane_count = layer->plane_count,
                                  .flip = bias && !is_excess ? 0x80 : 0,
                                  .is_excess = is_excess,
                                  .out = workspace->planes[is_excess] + at,
                                  .plane_stride = plane_stride(shared),
                                  .word_stride = geometry->track_stride,
                                  .flags = layer->has_contests && !is_excess ? workspace->flags + at : NULL,
                                  .flags_of = layer->flags_of,
                                  .events = shared->can_overflow && !is_excess ? &workspace->ninth_bits.events
                                                                               : NULL,
                                  .phase = phase,
                                  .quad = (int32_t)of_layer};
            const int32_t *channels = layer->channel_of + (job->group * layer->quads + of_layer) * QUAD;
            for (int byte = 0; byte < QUAD; byte++)
                pack.channel[byte] = channels[byte] < 0 ? NULL : staged(&stage, channels[byte], phase);
            shared->ops->pack(&pack);
        }
}

static int64_t job_positions(const Job *job) {
    return job->rows * job->shared->geometry.pitch;
}

static int64_t job_tiles(const Job *job) {
    return tiles_of(job_positions(job));
}

/* Whether the chunk's events are few enough to be corrected one by one; else forget them, and pack what they
 * lack. */
static void job_settle_chunk(Job *job) {
    Workspace *workspace = job->workspace;
    int64_t count = atomic_load(&workspace->ninth_bits.events.count);
    job->has_excess = count - job->events_before > events_per_chunk(job->shared);
    if (!job->has_excess) {
        job->events_before = count;
        return;
    }
    atomic_store(&workspace->ninth_bits.events.count, job->events_before);
    if (!workspace->planes[1])
        workspace->planes[1] = allocate(
            (size_t)(plane_stride(job->shared) * job->shared->layer->plane_count) * sizeof(uint32_t));
    if (!workspace->planes[1]) {
        job->has_excess = false;
        fail(job->shared);
    }
}

/* After the last chunk: what is left to be corrected. */
static void job_settle_events(const Job *job) {
    if (!ninth_bits_settle(&job->workspace->ninth_bits, job->shared->layer, &job->shared->geometry,
                           job_positions(job)))
        fail(job->shared);
}

/* ---- where a tile goes ---- */

typedef struct {
    Span spans[TILE];
    int span_count;
    int64_t lane_to[TILE];
    bool is_whole[TILE / 16];
} TilePlaces;

/* Split a row's part of the tile into spans that stay within 16 lanes. */
static void add_spans(TilePlaces *places, int lane, int end, int64_t to) {
    while (lane < end) {
        int first = lane / 16 * 16, stop = first + 16 < end ? first + 16 : end;
        uint16_t lanes = (uint16_t)(((1u << (stop - lane)) - 1) << (lane - first));
        Span *last = places->span_count ? &places->spans[places->span_count - 1] : NULL;
        if (last && last->first == first && last->to + __builtin_popcount(last->lanes) == to)
            last->lanes |= lanes;
        else
            places->spans[places->span_count++] = (Span){to, first, lanes};
        to += stop - lane;
        lane = stop;
    }
}

static void place_tile(const Job *job, int64_t tile, TilePlaces *places) {
    const Geometry *geometry = &job->shared->geometry;
    const Sink *sink = &geometry->sink;
    int64_t position = tile * TILE, row = position / geometry->pitch,
            start = row * geometry->pitch - position;
    places->span_count = 0;
    for (int lane = 0; lane < TILE; lane++)
        places->lane_to[lane] = NOWHERE;
    memset(places->is_whole, 0, sizeof places->is_whole);
    for (; row < job->rows && start < TILE; row++, start += geometry->pitch) {
        Row at = geometry_row(geometry, job->first_row + row);
        int64_t first = start < 0 ? -start : 0; /* column */
        int64_t end = start + at.length < TILE ? at.length : TILE - start;
        int64_t to = at.image * sink->stride_b + at.y * sink->stride_h + (at.x + first) * sink->stride_w;
        if (sink->stride_w == 1 && first < end)
            add_spans(places, (int)(start + first), (int)(start + end), to);
        for (int64_t column = first; sink->stride_w != 1 && column < end; column++, to += sink->stride_w)
            places->lane_to[start + column] = to;
        for (int64_t sixteen = (start + first + 15) / 16; 16 * sixteen + 16 <= start + end; sixteen++)
            places->is_whole[sixteen] = true;
    }
}

/* ---- multiplying and storing ---- */

static int channels_of(const Layer *layer, int64_t block) {
    int64_t left = layer->shape.n - block * BLOCK;
    return left < BLOCK ? (int)left : BLOCK;
}

static int positions_of(const Job *job, int64_t tile) {
    int64_t left = job_positions(job) - tile * TILE;
    return left < TILE ? (int)left : TILE;
}

static void start_sums(const Job *job, int64_t block, int32_t acc[BLOCK][TILE]) {
    const Layer *layer = job->shared->layer;
    int channels = channels_of(layer, block);
    for (int c = 0; c < BLOCK; c++) {
        int32_t offset = c < channels ? layer->offset[job->group * layer->shape.n + block * BLOCK + c] : 0;
        for (int i = 0; i < TILE; i++)
            acc[c][i] = offset;
    }
}

/* What a block's dense streams are in this chunk. */
static void find_streams(const Job *job, int64_t block, Stream streams[TEAMS][STREAMS]) {
    const Layer *layer = job->shared->layer;
    int64_t in_layer = job->group * layer->blocks + block;
    if (layer->has_contests) {
        const Start *start = layer->starts + (in_layer * layer->chunks + job->chunk) * TEAMS * STREAMS;
        for (int i = 0; i < TEAMS * STREAMS; i++)
            streams[i / STREAMS][i % STREAMS] =
                (Stream){layer->order + start[i].step, start[i + 1].step - start[i].step,
                         layer->dense + start[i].word};
        return;
    }
    int64_t step = first_step(layer, job->chunk), words = form_words(layer->form, false) * BLOCK;
    streams[0][0] = (Stream){layer->order + step, steps_of_chunk(layer, job->chunk),
                             layer->dense + (in_layer * layer->steps + step) * words};
}

static void note_path(Shared *shared, const char *ran_on) {
    pthread_mutex_lock(&shared->lock);
    shared->ran_on = ran_on;
    pthread_mutex_unlock(&shared->lock);
}

/* The chunk's products for channel blocks first..end-1. */
static void job_multiply(const Job *job, int64_t first, int64_t end) {
    Shared *shared = job->shared;
    const Layer *layer = shared->layer;
    const Workspace *workspace = job->workspace;
    int64_t tiles = job_tiles(job);
    const char *ran_on = NULL;
    for (int64_t block = first; block < end; block++) {
        int64_t channel = job->group * layer->shape.n + block * BLOCK;
        MultiplyArguments multiply = {.plane_stride = plane_stride(shared),
                                      .step_offset = shared->step_offset,
                                      .layer = layer,
                                      .first_entry =
                                          layer->first_entry + channel * layer->chunks + job->chunk,
                                      .channels = channels_of(layer, block),
                                      .ran_on = &ran_on};
        find_streams(job, block, multiply.streams);
        for (int64_t tile = 0; tile < tiles; tile++) {
            multiply.acc = workspace->acc[block * tiles + tile];
            multiply.positions = positions_of(job, tile);
            if (job->chunk == 0)
                start_sums(job, block, multiply.acc);
            for (int which = 0; which <= job->has_excess; which++) {
                multiply.planes = workspace->planes[which] + tile * TILE;
                multiply.flags = layer->has_contests ? workspace->flags + tile * TILE : NULL;
                shared->ops->multiply(&multiply);
            }
        }
    }
    note_path(shared, ran_on);
}

/* Send the sums of channel blocks first..end-1 on their way. */
static void job_store(const Job *job, int64_t first, int64_t end) {
    Shared *shared = job->shared;
    const Layer *layer = shared->layer;
    int64_t first_channel = first * BLOCK, tiles = job_tiles(job);
    int64_t channels = (end - 1) * BLOCK + channels_of(layer, end - 1) - first_channel;
    TileCorrections corrections = {.sums = NULL};
    TilePlaces places;
    for (int64_t tile = 0; tile < tiles; tile++) {
        place_tile(job, tile, &places);
        if (!ninth_bits_of_tile(&job->workspace->ninth_bits, layer, job->group, tile, first_channel, channels,
                                &corrections)) {
            fail(shared);
            break;
        }
        for (int64_t together = first; together < end; together += STORED) {
            StoreArguments store = {.sink = &shared->geometry.sink,
                                    .first_channel = job->group * layer->shape.n + together * BLOCK,
                                    .positions = positions_of(job, tile),
                                    .spans = places.spans,
                                    .span_count = places.span_count,
                                    .lane_to = places.lane_to,
                                    .is_whole = places.is_whole};
            for (int64_t block = together; block < end && block < together + STORED; block++) {
                int32_t (*acc)[TILE] = job->workspace->acc[block * tiles + tile];
                int count = channels_of(layer, block);
                if (corrections.touched)
                    ninth_bits_add(&corrections, channels, block * BLOCK - first_channel, count, acc);
                store.acc[block - together] = (const int32_t (*)[TILE])acc;
                store.channels += count;
            }
            shared->ops->store(&store);
        }
    }
    free(corrections.sums);
}

/* ---- spreading over threads ---- */

static Job make_job(Shared *shared, int64_t index, Workspace *workspace) {
    Job job = {.shared = shared, .workspace = workspace, .group = index / shared->geometry.jobs};
    geometry_job(&shared->geometry, index % shared->geometry.jobs, &job.first_row, &job.rows);
    atomic_store(&workspace->ninth_bits.events.count, 0);
    return job;
}

/* A stop-watch over this thread's CPU time. */
typedef struct {
    bool is_on;
    int64_t last, nanoseconds[TIMES];
} Watch;

static int64_t cpu_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Book the time since the last lap. */
static void lap(Watch *watch, int what) {
    if (!watch->is_on)
        return;
    int64_t now = cpu_nanoseconds();
    watch->nanoseconds[what] += now - watch->last;
    watch->last = now;
}

static void read_watch(Shared *shared, const Watch *watch) {
    pthread_mutex_lock(&shared->lock);
    for (int i = 0; i < TIMES; i++)
        shared->nanoseconds[i] += watch->nanoseconds[i];
    pthread_mutex_unlock(&shared->lock);
}

/* Task: a whole job. */
static void run_job(void *context, int64_t index) {
    Shared *shared = context;
    const Layer *layer = shared->layer;
    Workspace *workspace = workspace_take(shared);
    if (!workspace) {
        fail(shared);
        return;
    }
    Job job = make_job(shared, index, workspace);
    Watch watch = {.is_on = shared->is_timed, .last = shared->is_timed ? cpu_nanoseconds() : 0};
    job_stage(&job, 0, layer->shape.c);
    if (layer->is_im2col)
        job_im2col(&job, 0, layer->channels);
    lap(&watch, TIME_STAGE);
    if (shared->count)
        job_count(&job, 0, layer->quads);
    lap(&watch, TIME_COUNT);
    for (job.chunk = 0; job.chunk < layer->chunks; job.chunk++) {
        int64_t quads = quads_of_chunk(layer, job.chunk);
        job_pack(&job, 0, quads, false);
        job_settle_chunk(&job);
        if (job.has_excess)
            job_pack(&job, 0, quads, true);
        lap(&watch, TIME_PACK);
        job_multiply(&job, 0, layer->blocks);
        lap(&watch, TIME_MULTIPLY);
    }
    job_settle_events(&job);
    job_store(&job, 0, layer->blocks);
    lap(&watch, TIME_STORE);
    if (watch.is_on)
        read_watch(shared, &watch);
    workspace_give(shared, workspace);
}

/* Where jobs are fewer than threads, each pass of a job is shared out instead: channels, quads, blocks. */
typedef struct {
    Job *job;
    void (*work)(const Job *job, int64_t first, int64_t end);
    int64_t total, share;
} Pass;

static void run_share(void *context, int64_t index) {
    const Pass *pass = context;
    int64_t first = index * pass->share,
            end = first + pass->share < pass->total ? first + pass->share : pass->total;
    pass->work(pass->job, first, end);
}

static void run_pass(Job *job, void (*function)(const Job *, int64_t, int64_t), int64_t total,
                     int64_t granule, int cpu_threads) {
    int64_t shares = cpu_threads > 1 ? SHARES_PER_THREAD * (int64_t)cpu_threads : 1;
    int64_t share = ((total + shares - 1) / shares + granule - 1) / granule * granule;
    Pass pass = {job, function, total, share};
    parallel_for((total + share - 1) / share, cpu_threads, run_share, &pass);
}

static void pack_values(const Job *job, int64_t first, int64_t end) {
    job_pack(job, first, end, false);
}
static void pack_excess(const Job *job, int64_t first, int64_t end) {
    job_pack(job, first, end, true);
}

static void run_job_in_passes(Shared *shared, int64_t index, int cpu_threads) {
    const Layer *layer = shared->layer;
    Workspace *workspace = workspace_take(shared);
    if (!workspace) {
        fail(shared);
        return;
    }
    Job job = make_job(shared, index, workspace);
    run_pass(&job, job_stage, layer->shape.c, 16, cpu_threads);
    if (layer->is_im2col)
        run_pass(&job, job_im2col, layer->channels, 1, cpu_threads);
    if (shared->count)
        run_pass(&job, job_count, layer->quads, 1, cpu_threads);
    for (job.chunk = 0; job.chunk < layer->chunks; job.chunk++) {
        int64_t quads = quads_of_chunk(layer, job.chunk);
        run_pass(&job, pack_values, quads, 1, cpu_threads);
        job_settle_chunk(&job);
        if (job.has_excess)
            run_pass(&job, pack_excess, quads, 1, cpu_threads);
        run_pass(&job, job_multiply, layer->blocks, 1, cpu_threads);
    }
    job_settle_events(&job);
    run_pass(&job, job_store, layer->blocks, STORED, cpu_threads);
    workspace_give(shared, workspace);
}

/* ---- setting up ---- */

static PlaneMasks mask_plane(const Plane *plane) {
    PlaneMasks masks = {.is_exact = true};
    for (int pattern = 0; pattern < PATTERNS; pattern++)
        for (int byte = 0; byte < QUAD; byte++) {
            Code code = plane->code[pattern][byte];
            bool is_zero = !(pattern >> byte & 1);
            masks.masks[code][pattern] |= 0xFFu << (8 * byte);
            masks.uses[code] |= !is_zero;
            masks.is_exact &= code == EXACT || is_zero;
        }
    return masks;
}

static bool prepare(Shared *shared) {
    const Layer *layer = shared->layer;
    const Geometry *geometry = &shared->geometry;
    shared->masks = calloc((size_t)layer->plane_count + 1, sizeof *shared->masks);
    shared->step_offset = calloc((size_t)layer->steps + 1, sizeof *shared->step_offset);
    if (!shared->masks || !shared->step_offset)
        return false;
    if (shared->count && !regions_make(&shared->regions, layer, geometry))
        return false;
    bool reduces = false;
    for (int i = 0; i < layer->plane_count; i++) {
        shared->masks[i] = mask_plane(&layer->planes[i]);
        reduces |= shared->masks[i].uses[REDUCED];
    }
    shared->can_overflow = layer->raw && reduces;
    int words = words_per_quad(layer);
    uint32_t *offset = shared->step_offset;
    for (int64_t chunk = 0; chunk < layer->chunks; chunk++)
        for (int64_t tap = 0; tap < layer->taps; tap++)
            for (int64_t quad = 0; quad < quads_of_chunk(layer, chunk); quad++)
                for (int word = 0; word < words; word++) {
                    const Tap *at = &geometry->taps[tap];
                    int64_t track = (at->phase * layer->chunk_quads + quad) * words + word;
                    *offset++ = (uint32_t)(track * geometry->track_stride + tap_shift(geometry, at));
                }
    return plane_stride(shared) <= UINT32_MAX;
}

/* Once all jobs are done: what they counted, to counters. */
static bool fold_counts(const Shared *shared, int64_t slots, Outcome *outcome) {
    int workspaces = 0, i = 0;
    for (const Workspace *workspace = shared->spare; workspace; workspace = workspace->next)
        workspaces++;
    const int64_t **counts = malloc((size_t)workspaces * sizeof *counts + 1);
    if (!counts)
        return false;
    for (const Workspace *workspace = shared->spare; workspace; workspace = workspace->next)
        counts[i++] = workspace->counts;
    Tally tally = {{0}, {0}, {0}, {0}};
    bool is_done = count_fold(shared->ops, shared->layer, &shared->geometry, &shared->regions, counts,
                              workspaces, &tally);
    tally_finish(&tally, &shared->layer->rule, slots, outcome);
    free(counts);
    return is_done;
}

static void release(Shared *shared) {
    for (Workspace *next, *workspace = shared->spare; workspace; workspace = next) {
        next = workspace->next;
        workspace_release(workspace);
    }
    free(shared->masks);
    free(shared->step_offset);
    regions_release(&shared->regions);
    geometry_release(&shared->geometry);
    pthread_mutex_destroy(&shared->lock);
}

Layer *engine_pack(const VectorOps *ops, const ConvShape *shape, const SlotRule *rule, const int8_t *weights,
                   const int32_t *k_of) {
    Layer *layer = program_pack(shape, rule, weights, k_of, &ops->format);
    if (layer)
        layer->ops = ops;
    return layer;
}

bool engine_run(const Layer *layer, const Source *source, const Sink *sink, int cpu_threads, bool count,
                Outcome *outcome) {
    Shared shared = {.ops = layer->ops,
                     .layer = layer,
                     .count = count,
                     .is_timed = outcome->is_timed,
                     .lock = PTHREAD_MUTEX_INITIALIZER};
    if (!geometry_make(&shared.geometry, layer, source, sink, cpu_threads))
        return false;
    bool is_ready = prepare(&shared);
    int64_t jobs = shared.geometry.jobs * layer->shape.groups;
    if (is_ready && jobs >= cpu_threads)
        parallel_for(jobs, cpu_threads, run_job, &shared);
    for (int64_t job = 0; is_ready && jobs < cpu_threads && job < jobs; job++)
        run_job_in_passes(&shared, job, cpu_threads);
    if (is_ready && count && !shared.is_out_of_memory) {
        int64_t outputs = output_height(&layer->shape, source) * output_width(&layer->shape, source);
        int64_t slots = source->batch * outputs * layer->shape.groups * layer->shape.n;
        Watch watch = {.is_on = shared.is_timed, .last = shared.is_timed ? cpu_nanoseconds() : 0};
        is_ready = fold_counts(&shared, slots * slot_count(&layer->shape, &layer->rule), outcome);
        lap(&watch, TIME_COUNT);
        read_watch(&shared, &watch);
    }
    for (int i = 0; i < TIMES; i++)
        outcome->nanoseconds[i] += shared.nanoseconds[i];
    is_ready = is_ready && seen_settle(&layer->shape, source, &shared.seen);
    outcome->saw_nonfinite |= shared.seen.nonfinite;
    outcome->saw_negative |= shared.seen.negative;
    outcome->ran_on = shared.ran_on;
    bool is_done = is_ready && !shared.is_out_of_memory;
    release(&shared);
    return is_done;
}
