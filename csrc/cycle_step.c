/* What the PEs do in one cycle: one flat loop over all of them, written so that compilers vectorise it. */
#include "cycle_step.h"

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#if defined(__clang__)
#define VECTORISE _Pragma("clang loop vectorize(assume_safety)")
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define VECTORISE _Pragma("GCC ivdep")
#define UNROLL _Pragma("GCC unroll 4")
#else
#define VECTORISE
#define UNROLL
#endif

/* Sums of a block's PEs stay below 2^16, so that all lanes of the loop are 16 bits wide. */
enum { BLOCK = 4096 };

INLINE uint16_t is_wide(int16_t value, const cycle_port *port) {
    return (uint16_t)((uint16_t)(value + port->wide_offset) > port->narrow_limit);
}

/* Round to a multiple of 16, as round_half_even(value / 16) or floor(value / 16) does. */
INLINE int16_t squeeze(int16_t value, const cycle_port *port, int16_t half, int16_t tie_to_even) {
    int16_t bumped = (int16_t)(value + half + ((value >> 4) & tie_to_even));
    int16_t high = (int16_t)(bumped & ~15);
    return high < port->ceiling ? high : port->ceiling;
}

INLINE cycle_load step(const cycle_array *array, const int threads) {
    const size_t pes = array->pes;
    const cycle_port x_port = array->x, y_port = array->y;
    const int16_t half = array->half, tie_to_even = array->tie_to_even;
    const uint16_t every_slot = array->every_slot, x_alone = array->x_alone;
    const int16_t *restrict x = x_port.values, *restrict y = y_port.values;
    int32_t *restrict accumulators = array->accumulators;
    uint16_t *restrict busy = array->busy, *restrict at_least = array->at_least;
    uint16_t *restrict x_reduced = x_port.reduced, *restrict y_reduced = y_port.reduced;
    cycle_load load = {0, 0};

    for (size_t begin = 0; begin < pes; begin += BLOCK) {
        const size_t end = pes - begin < BLOCK ? pes : begin + BLOCK;
        uint16_t block_busy = 0, block_active = 0;
        VECTORISE
        for (size_t p = begin; p < end; p++) {
            const uint16_t valid = (uint16_t)(x[threads * pes + p] & y[threads * pes + p] & CYCLE_VALID);
            busy[p] = (uint16_t)(busy[p] + valid);
            block_busy = (uint16_t)(block_busy + valid);

            /* Lines without operands carry zeros: their pairs are inactive without being masked. */
            uint16_t pair[4], active = 0;
            UNROLL
            for (int t = 0; t < threads; t++) {
                pair[t] = (uint16_t)((x[t * pes + p] != 0) & (y[t * pes + p] != 0));
                active = (uint16_t)(active + pair[t]);
            }
            block_active = (uint16_t)(block_active + (active > 0));
            UNROLL
            for (int c = 1; c <= threads; c++) {
                uint16_t *restrict count = at_least + (c - 1) * pes;
                count[p] = (uint16_t)(count[p] + (active >= c));
            }

            /* With four threads `more` decides first, so that an extra `two` does no harm. */
            const uint16_t two = (active == 2) | every_slot;
            const uint16_t more = threads > 2 ? (active > 2) | every_slot : 0;
            uint16_t x_count = 0, y_count = 0;
            int32_t sum = 0;
            UNROLL
            for (int t = 0; t < threads; t++) {
                int16_t x_used = x[t * pes + p], y_used = y[t * pes + p];
                if (threads > 1) {
                    const uint16_t x_wide = is_wide(x_used, &x_port), y_wide = is_wide(y_used, &y_port);
                    const uint16_t x_gives = x_wide & (more | (two & (x_alone | y_wide)));
                    const uint16_t y_gives = y_wide & more;
                    x_used = x_gives ? squeeze(x_used, &x_port, half, tie_to_even) : x_used;
                    x_count = (uint16_t)(x_count + (x_gives & pair[t]));
                    if (threads > 2) {
                        y_used = y_gives ? squeeze(y_used, &y_port, half, tie_to_even) : y_used;
                        y_count = (uint16_t)(y_count + (y_gives & pair[t]));
                    }
                }
                sum += (int32_t)x_used * y_used;
            }
            accumulators[p] += sum;
            if (threads > 1)
                x_reduced[p] = (uint16_t)(x_reduced[p] + x_count);
            if (threads > 2)
                y_reduced[p] = (uint16_t)(y_reduced[p] + y_count);
        }
        load.busy += block_busy;
        load.active += block_active;
    }
    return load;
}

/* The same loop compiled for one kind of CPU, with each thread count known to the compiler. */
#define STEP_ON(cpu, target)                                                                                 \
    target static cycle_load step_on_##cpu(const cycle_array *array) {                                       \
        return array->threads == 1 ? step(array, 1) : array->threads == 2 ? step(array, 2) : step(array, 4); \
    }

STEP_ON(any, )

#if defined(__x86_64__) && defined(__GNUC__)
STEP_ON(avx2, __attribute__((target("avx2"))))
STEP_ON(avx512, __attribute__((target("avx512bw"))))

cycle_stepper cycle_choose_stepper(void) {
    if (__builtin_cpu_supports("avx512bw"))
        return step_on_avx512;
    return __builtin_cpu_supports("avx2") ? step_on_avx2 : step_on_any;
}
#else
cycle_stepper cycle_choose_stepper(void) {
    return step_on_any;
}
#endif
