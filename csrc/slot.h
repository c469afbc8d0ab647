/* Single operands under the slot rule: wide or narrow, exact or reduced. */
#ifndef SYSMT_SLOT_H
#define SYSMT_SLOT_H

#include "kernels.h"

/* Needs more than 4 bits: outside [-8, 7] if signed, above 15 if not. */
static inline bool is_wide(int value, bool is_signed) {
    return is_signed ? value < -8 || value > 7 : value > 15;
}

/* Selected for reduction where the rule says "when wide". */
static inline bool is_reducible(int value, bool is_signed, const SlotRule *rule) {
    return rule->reduces_always || is_wide(value, is_signed);
}

/* The 4 high bits, rounded: a multiple of 16, up to 256 (or +128) unless saturated. */
static inline int reduce_value(int value, bool is_signed, const SlotRule *rule) {
    int low = value & 15, high = value - low;
    if (rule->truncate)
        return high;
    bool is_odd = (high & 16) != 0;
    if (low > 8 || (low == 8 && is_odd))
        high += 16;
    int limit = is_signed ? 112 : 240;
    return rule->saturate && high > limit ? limit : high;
}

#endif
