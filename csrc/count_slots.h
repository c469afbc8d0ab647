/* Counting subsets of threads, 64 positions at a time. Included by every vector path behind its own
 * classify(). */

INLINE int32_t ones(uint64_t bits) {
    return __builtin_popcountll(bits);
}

INLINE void count_slots(const uint8_t *const channel[MAX_THREADS], int64_t count, const int threads,
                        bool is_signed, int32_t *counts) {
    const int half = 1 << (threads - 1), subsets = 1 << threads;
    for (int64_t at = 0; at < count; at += 64) {
        uint64_t all[16], wide[MAX_THREADS];
        all[0] = ~0ull;
        UNROLL for (int t = 0; t < threads; t++) {
            classify(channel[t] ? channel[t] + at : NULL, count - at, is_signed, &all[1 << t], &wide[t]);
            UNROLL for (int rest = 1; rest < 1 << t; rest++) all[1 << t | rest] = all[1 << t] & all[rest];
        }
        UNROLL for (int set = 1; set < subsets; set++) counts[set] += ones(all[set]);
        if (threads == 1)
            continue;
        UNROLL for (int t = 0; t < threads; t++) UNROLL for (int rest = 0; rest < half; rest++) {
            int others = (rest & ((1 << t) - 1)) | (rest >> t) << (t + 1);
            counts[subsets + t * half + rest] += ones(wide[t] & all[others]);
        }
    }
}

static void count(const uint8_t *const channel[MAX_THREADS], int64_t count, int threads, bool is_signed,
                  int32_t *counts) {
    if (threads == 4)
        count_slots(channel, count, 4, is_signed, counts);
    else if (threads == 2)
        count_slots(channel, count, 2, is_signed, counts);
    else
        count_slots(channel, count, 1, is_signed, counts);
}
