/* Which planes a layer needs: the slot rule evaluated for every weight pattern. Inside the planner only. */
#ifndef SYSMT_PLANES_H
#define SYSMT_PLANES_H

#include "program.h"

/* How a weight meets its activation, by the number of active threads. */
typedef enum {
    WITH_EXACT,         /* where the multiplier takes the exact weight */
    WITH_REDUCED,       /* where it takes the reduced weight */
    WITH_EITHER,        /* everywhere: both weights are the same */
    WITH_EITHER_SPARED, /* everywhere, and a 2-way collision spares the activation because the weight is
                           narrow */
    KINDS
} Kind;

/* The plane for slots whose non-zero weights are `weight_pattern` (T bits). */
Plane make_plane(const SlotRule *rule, Kind kind, int weight_pattern);

typedef struct {
    Plane planes[MAX_PLANES];
    int count;
    int8_t known[PATTERNS][KINDS]; /* 0: not made yet; -1: all zero; else index + 1 */
} PlaneSet;

/* Index of a plane, made when first asked for; -1 if it is zero everywhere. */
int find_plane(PlaneSet *set, const SlotRule *rule, Kind kind, int weight_pattern);

#endif
