/* Counters without looking at a single product.
 *
 * In one slot let a(S) be the number of rows m whose activations of all threads in S are non-zero, and w(S)
 * the number of columns n whose weights are. Then sum over |S| = j of a(S) * w(S) = sum over (m, n) of
 * binomial(c, j), c being the active threads: binomial moments, from which active[c] follows. For the reduced
 * operands one thread t is set apart (wide, or non-zero) and S runs over the others.
 *
 *   activations, one slot      [ a(S): 2^T | a(t wide, S): T * 2^(T-1) ]
 *   weights, one slot          [ w(S): 2^T | w(t wide, S): T * 2^(T-1) | w(t, S): T * 2^(T-1) ]
 */
#ifndef SYSMT_TALLY_H
#define SYSMT_TALLY_H

#include "kernels.h"

enum { MAX_SUBSETS = 16, MAX_OTHERS = 32, MAX_TALLY = MAX_SUBSETS + 2 * MAX_OTHERS };

static inline int subset_count(int threads) {
    return 1 << threads;
}
static inline int others_count(int threads) {
    return threads << (threads - 1);
}
static inline int tally_length(int threads) {
    return subset_count(threads) + 2 * others_count(threads);
}

/* The subset of all threads that holds t and the `rest` of the others. */
static inline int with_thread(int t, int rest) {
    int low = rest & ((1 << t) - 1), high = rest >> t;
    return low | 1 << t | high << (t + 1);
}

/* Products of the two sides, summed over slots; one accumulator per subset, folded at the end. */
typedef struct {
    int64_t both[MAX_SUBSETS];
    int64_t wide_any[MAX_OTHERS];  /* activation t wide, weight t non-zero */
    int64_t any_wide[MAX_OTHERS];  /* weight t wide, activation t non-zero */
    int64_t wide_wide[MAX_OTHERS]; /* both wide */
} Tally;

/* Count one slot's weights over n columns; weights[t * stride + n]. */
void tally_weights(const int8_t *const weights[MAX_THREADS], int64_t n, int64_t stride, int threads,
                   int32_t *counts);

/* Add one slot: activations' counts (in the weights' layout) times weights' counts. */
void tally_slot(Tally *tally, const int32_t *activations, const int32_t *weights, const SlotRule *rule);

/* Spread a(S) into the third part: a(t, S). */
void tally_spread(int32_t *counts, int threads);

void tally_merge(Tally *to, const Tally *from);

/* Fold into counters; slots is M * N * L. */
void tally_finish(const Tally *tally, const SlotRule *rule, int64_t slots, Outcome *outcome);

#endif
