/* The slot rule as planes: what a thread feeds the multiplier, for one weight pattern of its slot. */
#include "planes.h"

#include <string.h>

static Code plane_code(const SlotRule *rule, Kind kind, int contenders) {
    if (contenders <= 1)
        return kind == WITH_REDUCED ? ZERO : EXACT;
    if (contenders >= 3)
        return kind == WITH_EXACT ? ZERO : REDUCED;
    if (!rule->reduces_weight)
        return kind == WITH_REDUCED ? ZERO : kind == WITH_EITHER_SPARED ? EXACT : REDUCED;
    if (kind == WITH_EXACT)
        return rule->needs_both ? NARROW : ZERO;
    if (kind == WITH_REDUCED)
        return rule->needs_both ? WIDE : EXACT;
    return EXACT;
}

Plane make_plane(const SlotRule *rule, Kind kind, int weight_pattern) {
    Plane plane = {0};
    int threads = rule->threads;
    for (int pattern = 0; pattern < PATTERNS; pattern++)
        for (int byte = 0; byte < QUAD; byte++) {
            if (!(pattern >> byte & 1))
                continue; /* a zero stays zero */
            int slot_pattern = pattern >> (byte / threads * threads) & ((1 << threads) - 1);
            int active = __builtin_popcount((unsigned)(slot_pattern & weight_pattern));
            plane.code[pattern][byte] = (uint8_t)plane_code(rule, kind, rule->skips_zeros ? active : threads);
        }
    return plane;
}

int find_plane(PlaneSet *set, const SlotRule *rule, Kind kind, int weight_pattern) {
    int8_t *known = &set->known[weight_pattern][kind];
    if (!*known) {
        Plane plane = make_plane(rule, kind, weight_pattern), zero = {0};
        int index = 0;
        while (index < set->count && memcmp(&set->planes[index], &plane, sizeof plane))
            index++;
        if (!memcmp(&plane, &zero, sizeof plane)) {
            *known = -1;
        } else {
            if (index == set->count)
                set->planes[set->count++] = plane;
            *known = (int8_t)(index + 1);
        }
    }
    return *known < 0 ? -1 : *known - 1;
}
