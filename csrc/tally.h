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
 *
 * Activations are counted without v, which follows from the last part.
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
static inline int tally_length(int threads) {
    return 2 * subset_count(threads) + others_count(threads);
}
static inline int activations_length(int threads) {
    return subset_count(threads) + others_count(threads);
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
void tally_weights(const int8_t *const weights[MAX_THREADS], int64_t n, int64_t stride, int threads,
                   int32_t *counts);

static inline __attribute__((always_inline)) void add_products(int64_t *sums, const int64_t *a,
                                                               const int32_t *w, int count) {
    for (int i = 0; i < count; i++)
        sums[i] += a[i] * w[i];
}

/* Add one slot: activations' counts (tally_length) times weights' counts. In the header, so that every path
 * compiles it for its own vectors. */
static inline void tally_slot(Tally *tally, const int64_t *activations, const int32_t *weights,
                              const SlotRule *rule) {
    int subsets = subset_count(rule->threads);
    add_products(tally->both, activations, weights, subsets);
    if (rule->threads == 1 || rule->reduces_always)
        return; /* nothing is reduced, or everything: the patterns suffice */
    add_products(tally->wide_any, activations + subsets, weights, subsets);
    add_products(tally->any_wide, activations, weights + subsets, subsets);
    if (rule->needs_both)
        add_products(tally->wide_wide, activations + 2 * subsets, weights + 2 * subsets,
                     others_count(rule->threads));
}

/* Fold into counters; slots is M * N * L. */
void tally_finish(const Tally *tally, const SlotRule *rule, int64_t slots, Outcome *outcome);

#endif
