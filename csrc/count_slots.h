/* Counting subsets of threads, 64 positions at a time, and bringing activations and weights together.
 * Included by every vector path behind its own classify(), and compiled once for every T and TallyKind. */

INLINE int64_t ones(uint64_t bits) {
    return __builtin_popcountll(bits);
}

/* Add the positions in `mask`. */
INLINE void count_sets(const uint64_t all[16], const uint64_t wide[MAX_THREADS], uint64_t mask,
                       const int threads, const TallyKind kind, int64_t *counts) {
    const int half = 1 << (threads - 1), subsets = 1 << threads;
    UNROLL for (int set = 1; set < subsets; set++) {
        counts[set] += ones(all[set] & mask);
        if (kind == TALLY_PATTERNS)
            continue;
        int64_t total = 0;
        UNROLL for (int t = 0; t < threads; t++) {
            if (!(set >> t & 1))
                continue;
            int64_t here = ones(wide[t] & all[set] & mask);
            int rest = (set & ((1 << t) - 1)) | set >> (t + 1) << t;
            total += here;
            if (kind == TALLY_THREADS)
                counts[2 * subsets + t * half + rest] += here;
        }
        counts[subsets + set] += total;
    }
}

INLINE void count_slot(const CountArguments *arguments, const int32_t *channels, int64_t *counts,
                       const int threads, const TallyKind kind) {
    const int length = tally_length(threads, kind);
    const uint8_t *channel[MAX_THREADS];
    for (int t = 0; t < threads; t++)
        channel[t] = channels[t] < 0 ? NULL : arguments->bytes + channels[t] * arguments->channel_stride;
    for (int64_t grain = 0; grain * GRAIN < arguments->count; grain++) {
        uint64_t all[16], wide[MAX_THREADS];
        int64_t at = grain * GRAIN;
        all[0] = ~0ull;
        UNROLL for (int t = 0; t < threads; t++) {
            classify(channel[t] ? channel[t] + at : NULL, arguments->count - at, arguments->rule->is_signed,
                     &all[1 << t], &wide[t]);
            UNROLL for (int rest = 1; rest < 1 << t; rest++) all[1 << t | rest] = all[1 << t] & all[rest];
        }
        count_sets(all, wide, ~0ull, threads, kind, counts);
        for (int column = 0; column < arguments->columns; column++) {
            uint64_t mask = arguments->masks[column * arguments->mask_stride + grain];
            if (mask)
                count_sets(all, wide, mask, threads, kind, counts + (1 + column) * length);
        }
    }
}

INLINE void count_slots(const CountArguments *arguments, const int threads, const TallyKind kind) {
    for (int64_t slot = 0; slot < arguments->slots; slot++)
        count_slot(arguments, arguments->channel_of + slot * threads,
                   arguments->counts + slot * arguments->counts_stride, threads, kind);
}

INLINE void add_products(int64_t *sums, const int64_t *a, const int32_t *w, const int count) {
    for (int i = 0; i < count; i++)
        sums[i] += a[i] * w[i];
}

INLINE void fold_slots(const FoldArguments *fold, const int threads, const TallyKind kind) {
    const int length = tally_length(threads, kind), subsets = 1 << threads;
    Tally tally = *fold->tally;
    for (int64_t slot = 0; slot < fold->slots; slot++) {
        int64_t a[MAX_TALLY] = {0};
        int32_t w[MAX_TALLY] = {0};
        for (int of = 0; of < fold->workspaces; of++)
            for (int i = 0; i < length; i++)
                a[i] += fold->counts[of][slot * fold->counts_stride + i];
        for (int64_t tap = 0; tap < fold->taps; tap++) {
            const int32_t *of_tap = fold->weights + fold->tap[tap] * fold->tap_stride + slot * length;
            for (int i = 0; i < length; i++)
                w[i] += fold->sign * of_tap[i];
        }
        add_products(tally.both, a, w, subsets);
        if (kind == TALLY_PATTERNS)
            continue;
        add_products(tally.wide_any, a + subsets, w, subsets);
        add_products(tally.any_wide, a, w + subsets, subsets);
        if (kind == TALLY_THREADS)
            add_products(tally.wide_wide, a + 2 * subsets, w + 2 * subsets, threads << (threads - 1));
    }
    *fold->tally = tally;
}

#define FOR_EVERY_RULE(function, arguments, rule)                                                            \
    switch ((rule)->threads * 4 + (int)tally_kind(rule)) {                                                   \
    case 2 * 4 + TALLY_PATTERNS:                                                                             \
        function(arguments, 2, TALLY_PATTERNS);                                                              \
        break;                                                                                               \
    case 2 * 4 + TALLY_WIDTHS:                                                                               \
        function(arguments, 2, TALLY_WIDTHS);                                                                \
        break;                                                                                               \
    case 2 * 4 + TALLY_THREADS:                                                                              \
        function(arguments, 2, TALLY_THREADS);                                                               \
        break;                                                                                               \
    case 4 * 4 + TALLY_PATTERNS:                                                                             \
        function(arguments, 4, TALLY_PATTERNS);                                                              \
        break;                                                                                               \
    case 4 * 4 + TALLY_WIDTHS:                                                                               \
        function(arguments, 4, TALLY_WIDTHS);                                                                \
        break;                                                                                               \
    case 4 * 4 + TALLY_THREADS:                                                                              \
        function(arguments, 4, TALLY_THREADS);                                                               \
        break;                                                                                               \
    default:                                                                                                 \
        function(arguments, 1, TALLY_PATTERNS);                                                              \
    }

static void count_activations(const CountArguments *arguments) {
    FOR_EVERY_RULE(count_slots, arguments, arguments->rule)
}

static void fold_counts(const FoldArguments *arguments) {
    FOR_EVERY_RULE(fold_slots, arguments, arguments->rule)
}
