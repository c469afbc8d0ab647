/* One cycle of all PEs of the cycle engine (sysmt/hw/cycle.pyx).
 *
 * Register files are planes: plane t holds thread t's operand of every PE, row-major over the R x C
 * array, and one more plane behind them holds the control words that travel with the operands.
 */
#ifndef SYSMT_CYCLE_STEP_H
#define SYSMT_CYCLE_STEP_H

#include <stddef.h>
#include <stdint.h>

/* Control word: VALID marks a slot of the tile, LAST the tile's last slot on its line. */
enum { CYCLE_VALID = 1, CYCLE_LAST = 2 };

/* One of the two operands that a PE receives, and how it is squeezed into 4 bits. */
typedef struct {
    const int16_t *values; /* threads x pes, then the plane of control words */
    int16_t wide_offset;   /* wide when (uint16_t)(value + wide_offset) > narrow_limit: */
    uint16_t narrow_limit; /* 0 and 15 unsigned, 8 and 15 signed, 0 and 0 for "always" */
    int16_t ceiling;       /* largest value after rounding */
    uint16_t *reduced;     /* pes: reduced operands of active pairs in this tile */
} cycle_port;

/* All PEs. A two-way collision reduces operand x: the policies that reduce weights have the weights
 * at port x, the others the activations. Counts are of the running tile; K <= 65,535 keeps them in 16 bits.
 */
typedef struct {
    size_t pes;
    int threads; /* 1, 2 or 4 */
    cycle_port x, y;
    int16_t half;          /* added before the 4 low bits are cut: 7 to the nearest, 0 truncates */
    int16_t tie_to_even;   /* 1: an odd high half gets one more, so that ties go to even; else 0 */
    uint16_t every_slot;   /* 1: every slot is a collision of all threads (policies without S) */
    uint16_t x_alone;      /* 1: a two-way collision reduces a wide x even if y is narrow */
    int32_t *accumulators; /* pes */
    uint16_t *busy;        /* pes: slots worked on */
    uint16_t *at_least;    /* threads x pes: plane c - 1 counts slots with c or more active threads */
} cycle_array;

/* PEs at work in one cycle, and those of them with an active thread. */
typedef struct {
    int64_t busy, active;
} cycle_load;

/* Lets every PE work on the slot in its registers. */
typedef cycle_load (*cycle_stepper)(const cycle_array *array);

/* The fastest one for this CPU. */
cycle_stepper cycle_choose_stepper(void);

#endif
