/* Counting which activations are not zero, and wide: per slot, and per region of the image.
 *
 * A tap of the kernel meets every pixel but the rows and columns near the edges that belong to outputs beyond
 * them. So pixels are not counted tap by tap. Regions are: everything, each row that some tap misses, each
 * such column, and where the two cross. A tap sees
 *
 *     everything - rows it misses - columns it misses + where these cross
 *
 *     . . . . . .     3 x 3, padding 1: nine regions
 *     r . . . . c     (0, 0) everything     (0, j) column j     (i, 0) row i     (i, j) the crossing
 *
 * Jobs only add to the regions' counts. Weights come in once, when all jobs are done: count_fold.
 */
#ifndef SYSMT_COUNT_H
#define SYSMT_COUNT_H

#include "stage.h"

enum { MAX_EDGES = 6 }; /* rows, and columns; where there are more, every tap is a region of its own */

/* Lines of one phase that some tap misses. */
typedef struct {
    int64_t at[MAX_EDGES];
    int count;
    bool is_too_many;
} Edges;

typedef struct {
    int64_t rows; /* that exist */
    Edges row_edges, column_edges;
    bool is_tap_by_tap;
    int64_t first_region, regions; /* (1 + row edges, 1 + column edges), or one per tap of the layer */
    uint64_t *masks; /* (column edges, grains): positions of a row-major stream in that column */
} PhaseRegions;

typedef struct {
    PhaseRegions *phases;
    int phase_count;
    int64_t regions; /* of all phases */
    int64_t grains;  /* of GRAIN positions in the longest track */
    uint64_t *masks;
} Regions;

bool regions_make(Regions *regions, const Layer *layer, const Geometry *geometry);
void regions_release(Regions *regions);

/* Elements of a workspace's counts: (groups, quads, slots of a quad, regions, tally_length). */
int64_t counts_length(const Regions *regions, const Layer *layer);

/* Add a job's own pixels, quads first..end-1. */
void count_quads(const StageArguments *stage, const Regions *regions, int64_t first, int64_t end,
                 int64_t *counts);

/* Bring together what was counted, here in `workspaces` workspaces, and the weights that met it; false when
 * memory runs out. */
bool count_fold(const VectorOps *ops, const Layer *layer, const Geometry *geometry, const Regions *regions,
                const int64_t *const *counts, int workspaces, Tally *tally);

#endif
