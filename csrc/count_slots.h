/* Counting subsets of threads, 64 positions at a time. Included by every vector path behind its own
 * classify(). */

INLINE int64_t ones(uint64_t bits) {
    return __builtin_popcountll(bits);
}

/* Add the positions in `mask`: where all threads of a set are not zero; where one of them is wide, too. */
INLINE void count_sets(const uint64_t all[16], const uint64_t wide[MAX_THREADS], uint64_t mask,
                       const int threads, int64_t *counts) {
    const int half = 1 << (threads - 1), subsets = 1 << threads;
    UNROLL for (int set = 1; set < subsets; set++) counts[set] += ones(all[set] & mask);
    if (threads == 1)
        return;
    UNROLL for (int t = 0; t < threads; t++) UNROLL for (int rest = 0; rest < half; rest++) {
        int others = (rest & ((1 << t) - 1)) | (rest >> t) << (t + 1);
        counts[subsets + t * half + rest] += ones(wide[t] & all[others] & mask);
    }
}

INLINE void count_slots(const CountArguments *arguments, const int threads) {
    const int length = (1 << threads) + (threads << (threads - 1));
    for (int64_t block = 0; block * STREAM < arguments->count; block++) {
        uint64_t all[16], wide[MAX_THREADS];
        int64_t at = block * STREAM;
        all[0] = ~0ull;
        UNROLL for (int t = 0; t < threads; t++) {
            const uint8_t *channel = arguments->channel[t];
            classify(channel ? channel + at : NULL, arguments->count - at, arguments->is_signed, &all[1 << t],
                     &wide[t]);
            UNROLL for (int rest = 1; rest < 1 << t; rest++) all[1 << t | rest] = all[1 << t] & all[rest];
        }
        count_sets(all, wide, ~0ull, threads, arguments->counts);
        for (int column = 0; column < arguments->columns; column++) {
            uint64_t mask = arguments->masks[column * arguments->mask_stride + block];
            if (mask)
                count_sets(all, wide, mask, threads, arguments->counts + (1 + column) * length);
        }
    }
}

static void count(const CountArguments *arguments) {
    if (arguments->threads == 4)
        count_slots(arguments, 4);
    else if (arguments->threads == 2)
        count_slots(arguments, 2);
    else
        count_slots(arguments, 1);
}
