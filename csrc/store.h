/* Sums to where they belong: what every vector path compiles for itself, behind its own primitives
 *
 *     finish(sink, channel, sums)                LANES sums of one channel: the bits that go to memory
 *     transpose_words(words)                     LANES x LANES: channels of positions to positions of
 * channels store_channels(to, words, lane, channels)  up to STORED blocks of neighbouring channels of one
 * position: words[i * LANES + lane], one vector after the other store_spans(store) positions that are
 * neighbours in memory
 */

enum { SQUARE = STORED * BLOCK }; /* channels that are a cache line together */

/* LANES positions of all channels, a position's neighbouring channels side by side. */
INLINE void finish_square(const StoreArguments *store, int at, Vector words[SQUARE]) {
    UNROLL for (int i = 0; i < SQUARE; i += LANES) {
        UNROLL for (int c = 0; c < LANES; c++) words[i + c] =
            i + c < store->channels
                ? finish(store->sink, store->first_channel + i + c, stored_sums(store, i + c) + at)
                : no_sums();
        transpose_words(words + i);
    }
}

/* Channels that are not next to each other. */
static void scatter_channels(const StoreArguments *store, int32_t *to, const Vector words[SQUARE], int lane) {
    int32_t values[SQUARE];
    store_channels(values, words, lane, SQUARE);
    for (int c = 0; c < store->channels; c++)
        to[c * store->sink->stride_n] = values[c];
}

/* A position at a time, whole cache lines where there are as many channels: half lines take several times as
 * long. */
static void store_lanes(const StoreArguments *store) {
    int32_t *data = (int32_t *)store->sink->data + store->first_channel * store->sink->stride_n;
    const bool is_line = store->channels == SQUARE && store->sink->stride_n == 1;
    for (int at = 0; at < store->positions; at += LANES) {
        Vector words[SQUARE];
        finish_square(store, at, words);
        if (is_line && store->is_whole[at / 16]) {
            int32_t *first = data + store->lane_to[at];
            UNROLL for (int lane = 0; lane < LANES; lane++)
                store_channels(first + lane * store->sink->stride_w, words, lane, SQUARE);
            continue;
        }
        UNROLL for (int lane = 0; lane < LANES; lane++) {
            int64_t offset = store->lane_to[at + lane];
            if (offset == NOWHERE)
                continue;
            if (store->sink->stride_n != 1)
                scatter_channels(store, data + offset, words, lane);
            else if (is_line)
                store_channels(data + offset, words, lane, SQUARE);
            else
                store_channels(data + offset, words, lane, store->channels);
        }
    }
}

static void store_tile(const StoreArguments *store) {
    if (store->sink->stride_w == 1)
        store_spans(store);
    else
        store_lanes(store);
}
