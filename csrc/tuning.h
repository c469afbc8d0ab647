/* Every number that was chosen for speed, and where it comes from. None of them changes a result.
 *
 * The home of these numbers is one core of an AMD EPYC (Zen 4: 32 KB of first-level data cache, 1 MB of
 * second-level cache). "Measured" says what was measured there, on the layers of ResNet-18 and CIFAR
 * ResNet-20; everything else is a share of a cache or an estimate. On another kind of core, start here.
 */
#ifndef SYSMT_TUNING_H
#define SYSMT_TUNING_H

/* ---- the second-level cache (1 MB) ---- */

enum {
    /* Sums of all channels of one job. They are added to chunk by chunk, so they share the cache with a
     * chunk's planes. A share of the cache. */
    SUMS_BYTES = 384 << 10,
    /* A job's output positions stay within these, whatever the number of channels: at least a tile, and no
     * more than keep a job's bytes and planes small. Estimates. */
    LEAST_JOB_POSITIONS = 128,
    MOST_JOB_POSITIONS = 2048,
    /* Planes of one chunk. Without a dense stream, entries jump between all planes, which must fit beside the
     * sums: measured, chunks made pruned layers twice as fast as one pass over K. A dense stream runs through
     * one or two of the planes, so that all of them together may be larger. Shares of the cache. */
    ENTRY_CHUNK_BYTES = 384 << 10,
    DENSE_CHUNK_BYTES = 1536 << 10,
    LEAST_CHUNK_QUADS = 4, /* or passes over the sums would cost more than the products; an estimate */
};

/* ---- the first-level cache (32 KB) ---- */

enum {
    /* Words of a stream that are applied to all positions of a tile before the next are read: half of the
     * cache. */
    STRIP_WORDS = 4096,
    /* Steps ahead of its use that an operand of a contest is asked for, since streams of contests skip steps,
     * which the hardware does not foresee. Measured: asking for the words, too, is slower but for 49
     * positions. */
    AHEAD = 4,
    /* float32 activations that are asked for before they are quantised: 12 KB, as the hardware's own
     * prefetching stops at every page of 4 KB. Measured: staging CIFAR ResNet-20 takes 9 ms, before it
     * took 12. The second is in pixels, where these have many channels. */
    QUANTISE_AHEAD = 3072,
    QUANTISE_AHEAD_PIXELS = 48,
    /* Tracks begin so many positions behind a multiple of 64: at a power of two apart they would compete for
     * the same lines of the cache. */
    TRACK_SKEW = 16,
};

/* ---- shares of work; estimates ---- */

enum {
    JOBS_PER_THREAD = 4, /* so that threads that finish early find more */
    LEAST_SHARE_POSITIONS =
        128, /* of a job that was cut for that: a tile, of which smaller jobs leave lanes idle */
    PIECE_POSITIONS = 512,        /* longer rows of a pointwise layer are cut into pieces */
    SHARES_PER_THREAD = 2,        /* of a job's pass, where jobs are fewer than threads */
    FINGERPRINT_BYTES = 32 << 10, /* larger arrays are read by several threads */
    /* While there is at most one event for so many packed positions, events are corrected one by one; where
     * there are more, a second multiply is cheaper. */
    POSITIONS_PER_EVENT = 8,
};

/* What a step costs, in vector multiply-accumulates per channel. Measured with AVX-512: an entry loads its
 * plane for one channel alone; a select takes a second load and a blend. */
static const double COST_ENTRY = 1.5, COST_PLAIN = 1.0, COST_SELECT = 1.65;

/* ---- memory ---- */

enum {
    /* Buffers that are kept from run to run, and the largest: the scratch of a few threads, without holding
     * on to that of one huge layer. Measured: fresh pages cost a tenth of a network's forward. */
    KEPT_BUFFERS = 16,
    LARGEST_KEPT = 8 << 20,
    /* glibc's heap keeps up to this much freed memory at its top, and maps nothing smaller than the second
     * afresh, which is the most that glibc allows. Measured: fresh pages cost a fifth of a CIFAR ResNet's
     * forward. */
    HEAP_TRIM_BYTES = 256 << 20,
    HEAP_MAP_BYTES = 32 << 20,
};

#endif
