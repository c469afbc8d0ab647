#include "tally.h"
#include "slot.h"

#include <string.h>

/* Turn counts of exact patterns into counts of supersets, in place. */
static void sum_supersets(int32_t *counts, int bits) {
    for (int bit = 0; bit < bits; bit++)
        for (int set = 0; set < 1 << bits; set++)
            if (!(set >> bit & 1))
                counts[set] += counts[set | 1 << bit];
}

/* Remove bit t: the pattern of the others. */
static int without_thread(int t, int set) {
    return (set & ((1 << t) - 1)) | (set >> (t + 1)) << t;
}

void tally_weights(const int8_t *const weights[MAX_THREADS], int64_t n, int64_t stride, const SlotRule *rule,
                   int32_t *counts) {
    int threads = rule->threads, half = 1 << (threads - 1), subsets = subset_count(threads);
    int32_t wide[MAX_OTHERS] = {0};
    TallyKind kind = tally_kind(rule);
    memset(counts, 0, (size_t)tally_length(threads, kind) * sizeof *counts);
    for (int64_t column = 0; column < n; column++) {
        int pattern = 0, value[MAX_THREADS] = {0};
        for (int t = 0; t < threads; t++) {
            value[t] = weights[t] ? weights[t][column * stride] : 0;
            pattern |= (value[t] != 0) << t;
        }
        counts[pattern]++;
        for (int t = 0; t < threads; t++)
            if (is_wide(value[t], true))
                wide[t * half + without_thread(t, pattern)]++;
    }
    sum_supersets(counts, threads);
    if (kind == TALLY_PATTERNS)
        return;
    for (int t = 0; t < threads; t++) {
        sum_supersets(wide + t * half, threads - 1);
        for (int rest = 0; rest < half; rest++)
            counts[subsets + with_thread(t, rest)] += wide[t * half + rest];
    }
    if (kind == TALLY_THREADS)
        memcpy(counts + 2 * subsets, wide, (size_t)others_count(threads) * sizeof *counts);
}

static int count_bits(int set) {
    return __builtin_popcount((unsigned)set);
}

static int64_t binomial(int n, int k) {
    int64_t result = k <= n;
    for (int i = 0; i < k; i++)
        result = result * (n - i) / (i + 1);
    return result;
}

/* From moments[j] = sum of binomial(c, j) to how often each c occurred: exact inversion. */
static void invert_moments(const int64_t *moments, int top, int64_t *counts) {
    for (int c = 0; c <= top; c++) {
        counts[c] = 0;
        for (int j = c; j <= top; j++)
            counts[c] += ((j - c) % 2 ? -1 : 1) * binomial(j, c) * moments[j];
    }
}

/* From moments of the number of others to the operands reduced: at a 2-way collision those of `at_two`, at
 * more those of `at_more`. */
static int64_t count_reduced(const int64_t *at_two, const int64_t *at_more, const SlotRule *rule) {
    int64_t total = 0, two[MAX_THREADS] = {0}, more[MAX_THREADS];
    if (at_two)
        invert_moments(at_two, rule->threads - 1, two);
    invert_moments(at_more, rule->threads - 1, more);
    for (int others = 0; others < rule->threads; others++) {
        int contenders = rule->skips_zeros ? others + 1 : rule->threads;
        total += contenders == 2 ? two[others] : contenders >= 3 ? more[others] : 0;
    }
    return total;
}

void tally_finish(const Tally *tally, const SlotRule *rule, int64_t slots, Outcome *outcome) {
    int threads = rule->threads, half = 1 << (threads - 1);
    int64_t moments[MAX_THREADS + 1] = {slots}, active[MAX_THREADS + 1];
    /* Moments of the other active threads, of an operand set apart: any, or wide. */
    int64_t any[MAX_THREADS] = {0}, wide_a[MAX_THREADS] = {0}, wide_w[MAX_THREADS] = {0},
            wide_both[MAX_THREADS] = {0};
    for (int set = 1; set < subset_count(threads); set++) {
        int others = count_bits(set) - 1;
        moments[others + 1] += tally->both[set];
        any[others] += (others + 1) * tally->both[set];
        wide_a[others] += tally->wide_any[set];
        wide_w[others] += tally->any_wide[set];
    }
    for (int i = 0; i < others_count(threads); i++)
        wide_both[count_bits(i % half)] += tally->wide_wide[i];
    invert_moments(moments, threads, active);
    for (int c = 0; c <= threads; c++)
        outcome->active[c] += active[c];
    if (threads == 1)
        return;
    const int64_t *activations = rule->reduces_always ? any : wide_a;
    const int64_t *weights = rule->reduces_always ? any : wide_w;
    const int64_t *at_two = rule->needs_both ? wide_both : rule->reduces_weight ? weights : activations;
    outcome->reduced_activations += count_reduced(rule->reduces_weight ? NULL : at_two, activations, rule);
    outcome->reduced_weights += count_reduced(rule->reduces_weight ? at_two : NULL, weights, rule);
}
