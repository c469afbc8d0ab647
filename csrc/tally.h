/* Counters without looking at a single product.
 *
 * In one slot let a(S) be the number of rows m whose activations of all threads in S are non-zero, and w(S)
 * the number of columns n whose weights are. Then sum over |S| = j of a(S) * w(S) = sum over (m, n) of
 * binomial(c, j), c being the active threads: binomial moments, from which active[c] follows. For the reduced
 * operands one thread t is set apart (wide, or non-zero) and S runs over the others.
 *
 * For reductions, v(S) = sum over t in S of the rows whose activations of S are non-zero and that of t wide.
 *
 *   one slot, one side      [ n(S): 2^T | v(S): 2^T | n(S) with t wide, by t and the rest of S: T * 2^(T-1) ]
 *                                         \ where width matters   \ where it must be wide on both sides
 */
#ifndef SYSMT_TALLY_H
#define SYSMT_TALLY_H

#include "kernels.h"

enum { MAX_SUBSETS = 16, MAX_OTHERS = 32, MAX_TALLY = 2 * MAX_SUBSETS + MAX_OTHERS };

static inline int subset_count(int threads) {
    return 1 << threads;
}
static inline int others_count(int threads) {
    return threads << (threads - 1);
}

/* What is counted beyond n(S). At T = 1 nothing is reduced; under policy S everything, so that patterns
 * suffice.
 */
typedef enum { TALLY_PATTERNS, TALLY_WIDTHS, TALLY_THREADS } TallyKind;

static inline TallyKind tally_kind(const SlotRule *rule) {
    if (rule->threads == 1 || rule->reduces_always)
        return TALLY_PATTERNS;
    return rule->needs_both ? TALLY_THREADS : TALLY_WIDTHS;
}
static inline __attribute__((always_inline)) int tally_length(int threads, TallyKind kind) {
    return subset_count(threads) * (kind == TALLY_PATTERNS ? 1 : 2) +
           (kind == TALLY_THREADS ? others_count(threads) : 0);
}

/* The subset of all threads that holds t and the `rest` of the others. */
static inline int with_thread(int t, int rest) {
    int low = rest & ((1 << t) - 1), high = rest >> t;
    return low | 1 << t | high << (t + 1);
}

/* Products of the two sides, summed over slots; one accumulator per subset, folded at the end. */
typedef struct {
    int64_t both[MAX_SUBSETS];
    int64_t wide_any[MAX_SUBSETS]; /* v(S) of activations, n(S) of weights */
    int64_t any_wide[MAX_SUBSETS]; /* n(S) of activations, v(S) of weights */
    int64_t wide_wide[MAX_OTHERS]; /* thread t wide on both sides */
} Tally;

/* Count one slot's weights over n columns; weights[t * stride + n]. */
void tally_weights(const int8_t *const weights[MAX_THREADS], int64_t n, int64_t stride, const SlotRule *rule,
                   int32_t *counts);

/* Fold into counters; slots is M * N * L. */
void tally_finish(const Tally *tally, const SlotRule *rule, int64_t slots, Outcome *outcome);

#endif
