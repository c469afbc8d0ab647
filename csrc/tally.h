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

/* Spread a(S) into the third part: a(t, S). */
static inline void tally_spread(int32_t *counts, int threads) {
    int half = 1 << (threads - 1);
    int32_t *spread = counts + subset_count(threads) + others_count(threads);
    for (int t = 0; t < threads; t++)
        for (int rest = 0; rest < half; rest++)
            spread[t * half + rest] = counts[with_thread(t, rest)];
}

static inline __attribute__((always_inline)) void add_products(int64_t *sums, const int32_t *a,
                                                               const int32_t *w, int count) {
    for (int i = 0; i < count; i++)
        sums[i] += (int64_t)a[i] * w[i];
}

/* Add one slot: activations' counts (in the weights' layout) times weights' counts. In the header, so that
 * every path compiles it for its own vectors. */
static inline void tally_slot(Tally *tally, const int32_t *activations, const int32_t *weights,
                              const SlotRule *rule) {
    int subsets = subset_count(rule->threads), others = others_count(rule->threads);
    const int32_t *a_wide = activations + subsets, *a_any = a_wide + others;
    const int32_t *w_wide = weights + subsets, *w_any = w_wide + others;
    add_products(tally->both, activations, weights, subsets);
    if (rule->threads == 1 || rule->reduces_always)
        return; /* nothing is reduced, or everything: the patterns suffice */
    add_products(tally->wide_any, a_wide, w_any, others);
    add_products(tally->any_wide, a_any, w_wide, others);
    if (rule->needs_both)
        add_products(tally->wide_wide, a_wide, w_wide, others);
}

void tally_merge(Tally *to, const Tally *from);

/* Fold into counters; slots is M * N * L. */
void tally_finish(const Tally *tally, const SlotRule *rule, int64_t slots, Outcome *outcome);

#endif
