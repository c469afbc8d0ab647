/* AVX2: planes of int16, 8 positions per vector, vpmaddwd.
 *
 * vpmaddubsw would saturate at 16 bits, so operands are widened when they are packed. Then 256 and +128 fit,
 * nothing is biased, and a quad takes two 32-bit words: a lane holds one of them, of one position.
 */
#include "engine.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 7)

#include "transpose.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
#endif

#include <immintrin.h>
#include <string.h>

enum { LANES = 8, WORDS = 2 };

#define PATH_NAME "avx2"

/* ---- quantising ---- */

typedef struct {
    __m256 inverse, low, high;
    __m256i nonfinite; /* lanes of everything seen so far */
    __m256 negative;
} Rounder;

INLINE Rounder make_rounder(const Quantiser *quantiser) {
    return (Rounder){
        _mm256_set1_ps(quantiser->inverse_scale), _mm256_set1_ps(quantiser->is_signed ? -127 : 0),
        _mm256_set1_ps(quantiser->is_signed ? 127 : 255), _mm256_setzero_si256(), _mm256_setzero_ps()};
}

INLINE void note(const Rounder *rounder, Seen *seen) {
    seen->nonfinite |= _mm256_movemask_epi8(rounder->nonfinite) != 0;
    seen->negative |= _mm256_movemask_ps(rounder->negative) != 0;
}

/* 8 floats to 8 bytes. */
INLINE uint64_t quantise(Rounder *rounder, __m256 x) {
    const __m256i exponent = _mm256_set1_epi32(0x7F800000);
    __m256i bits = _mm256_and_si256(_mm256_castps_si256(x), exponent);
    rounder->nonfinite = _mm256_or_si256(rounder->nonfinite, _mm256_cmpeq_epi32(bits, exponent));
    rounder->negative = _mm256_or_ps(rounder->negative, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
    __m256 scaled = _mm256_mul_ps(x, rounder->inverse);
    scaled = _mm256_max_ps(_mm256_min_ps(scaled, rounder->high), rounder->low);
    __m256i low_bytes = _mm256_shuffle_epi8(_mm256_cvtps_epi32(scaled), _mm256_set1_epi32(0x0C080400));
    uint32_t low = (uint32_t)_mm256_extract_epi32(low_bytes, 0),
             high = (uint32_t)_mm256_extract_epi32(low_bytes, 4);
    return low | (uint64_t)high << 32;
}

INLINE __m256 load_partial(const float *from, int64_t stride, int64_t count) {
    float values[LANES] = {0};
    for (int64_t i = 0; i < count && i < LANES; i++)
        values[i] = from[i * stride];
    return _mm256_loadu_ps(values);
}

/* 8 floats, every second of memory; nothing behind the last is read. */
INLINE __m256 load_even(const float *from) {
    __m256 low = _mm256_loadu_ps(from), high = _mm256_loadu_ps(from + 7);
    __m256 mixed = _mm256_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 2, 0));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), _MM_SHUFFLE(3, 1, 2, 0)));
}

static void quantise_row(const float *from, int64_t stride, int64_t count, const Quantiser *quantiser,
                         uint8_t *to, Seen *seen) {
    Rounder rounder = make_rounder(quantiser);
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t left = count - i < LANES ? count - i : LANES;
        __m256 x = left == LANES && stride == 1   ? _mm256_loadu_ps(from + i)
                   : left == LANES && stride == 2 ? load_even(from + 2 * i)
                                                  : load_partial(from + i * stride, stride, left);
        uint64_t bytes = quantise(&rounder, x);
        if (left == LANES)
            memcpy(to + i, &bytes, LANES);
        else
            memcpy(to + i, &bytes, (size_t)left);
    }
    note(&rounder, seen);
}

INLINE void store_columns(__m128i columns[16], int64_t pixels, int64_t channels, uint8_t *to,
                          int64_t channel_stride) {
    for (int64_t c = 0; c < channels && c < 16; c++)
        if (pixels >= 16)
            _mm_storeu_si128((__m128i *)(to + c * channel_stride), columns[c]);
        else
            memcpy(to + c * channel_stride, &columns[c], (size_t)pixels);
}

static void quantise_pixels(const float *from, int64_t pixel_stride, int64_t count, int64_t channels,
                            const Quantiser *quantiser, uint8_t *to, int64_t channel_stride, Seen *seen) {
    Rounder rounder = make_rounder(quantiser);
    for (int64_t i = 0; i < count; i += 16)
        for (int64_t c = 0; c < channels; c += 16) {
            __m128i rows[16];
            for (int p = 0; p < 16; p++) {
                uint64_t half[2] = {0, 0};
                for (int h = 0; h < 2 && i + p < count && c + h * LANES < channels; h++) {
                    const float *at = from + (i + p) * pixel_stride + c + h * LANES;
                    int64_t left = channels - c - h * LANES;
                    half[h] =
                        quantise(&rounder, left >= LANES ? _mm256_loadu_ps(at) : load_partial(at, 1, left));
                }
                rows[p] = _mm_set_epi64x((int64_t)half[1], (int64_t)half[0]);
            }
            transpose_bytes(rows);
            store_columns(rows, count - i, channels - c, to + c * channel_stride + i, channel_stride);
        }
    note(&rounder, seen);
}

static void transpose_pixels(const uint8_t *from, int64_t pixel_stride, int64_t count, int64_t channels,
                             uint8_t *to, int64_t channel_stride) {
    for (int64_t i = 0; i < count; i += 16)
        for (int64_t c = 0; c < channels; c += 16) {
            size_t bytes = channels - c < 16 ? (size_t)(channels - c) : 16;
            __m128i rows[16];
            for (int p = 0; p < 16; p++) {
                rows[p] = _mm_setzero_si128();
                if (i + p < count)
                    memcpy(&rows[p], from + (i + p) * pixel_stride + c, bytes);
            }
            transpose_bytes(rows);
            store_columns(rows, count - i, channels - c, to + c * channel_stride + i, channel_stride);
        }
}

/* ---- packing ---- */

/* 32 positions of four channels, byte by byte, to four vectors of 8 quads. */
INLINE void interleave(const PackArguments *pack, int64_t at, __m256i quads[4]) {
    __m256i c[QUAD];
    UNROLL for (int byte = 0; byte < QUAD; byte++) c[byte] =
        pack->channel[byte] ? _mm256_loadu_si256((const __m256i *)(pack->channel[byte] + at))
                            : _mm256_setzero_si256();
    __m256i low01 = _mm256_unpacklo_epi8(c[0], c[1]), high01 = _mm256_unpackhi_epi8(c[0], c[1]);
    __m256i low23 = _mm256_unpacklo_epi8(c[2], c[3]), high23 = _mm256_unpackhi_epi8(c[2], c[3]);
    /* Part k holds positions 4k..4k+3 of each 16. */
    __m256i part0 = _mm256_unpacklo_epi16(low01, low23), part1 = _mm256_unpackhi_epi16(low01, low23);
    __m256i part2 = _mm256_unpacklo_epi16(high01, high23), part3 = _mm256_unpackhi_epi16(high01, high23);
    quads[0] = _mm256_permute2x128_si256(part0, part1, 0x20);
    quads[1] = _mm256_permute2x128_si256(part2, part3, 0x20);
    quads[2] = _mm256_permute2x128_si256(part0, part1, 0x31);
    quads[3] = _mm256_permute2x128_si256(part2, part3, 0x31);
}

/* Bit b of a lane: byte b is not zero. */
INLINE __m256i nonzero_pattern(__m256i quad) {
    __m256i zero = _mm256_cmpeq_epi8(quad, _mm256_setzero_si256());
    __m256i bits = _mm256_andnot_si256(zero, _mm256_set1_epi32(0x08040201));
    bits = _mm256_or_si256(bits, _mm256_srli_epi32(bits, 16));
    bits = _mm256_or_si256(bits, _mm256_srli_epi32(bits, 8));
    return _mm256_and_si256(bits, _mm256_set1_epi32(15));
}

/* Look up 16 dwords by pattern. */
INLINE __m256i look_up(const uint32_t table[PATTERNS], __m256i patterns) {
    __m256i low = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)table), patterns);
    __m256i high = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)(table + 8)), patterns);
    __m256i is_high = _mm256_slli_epi32(patterns, 28); /* bit 3 to the sign */
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), _mm256_castsi256_ps(is_high)));
}

/* Bytes 2 * word and 2 * word + 1 of every lane, each twice: as 16-bit masks, or with the value in the high
 * half. */
INLINE __m256i double_bytes(__m256i quad, int word) {
    return _mm256_shuffle_epi8(quad,
                               word ? _mm256_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15,
                                                       2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15)
                                    : _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 0,
                                                       0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13));
}

INLINE __m256i widen(__m256i quad, int word, bool is_signed) {
    __m256i doubled = double_bytes(quad, word);
    return is_signed ? _mm256_srai_epi16(doubled, 8) : _mm256_srli_epi16(doubled, 8);
}

INLINE __m256i wide_mask(__m256i value, bool is_signed) {
    __m256i above = _mm256_cmpgt_epi16(value, _mm256_set1_epi16(is_signed ? 7 : 15));
    return is_signed ? _mm256_or_si256(above, _mm256_cmpgt_epi16(_mm256_set1_epi16(-8), value)) : above;
}

/* The 4 high bits, rounded, of wide values (of all under policy S). */
INLINE __m256i reduce_words(__m256i value, const SlotRule *rule) {
    __m256i rounded = value;
    if (!rule->truncate) {
        __m256i is_odd = _mm256_and_si256(_mm256_srli_epi16(value, 4), _mm256_set1_epi16(1));
        rounded = _mm256_add_epi16(value, _mm256_add_epi16(is_odd, _mm256_set1_epi16(7)));
    }
    rounded = _mm256_and_si256(rounded, _mm256_set1_epi16(-16));
    if (rule->saturate)
        rounded = _mm256_min_epi16(rounded, _mm256_set1_epi16(rule->is_signed ? 112 : 240));
    if (rule->reduces_always)
        return rounded;
    return _mm256_blendv_epi8(value, rounded, wide_mask(value, rule->is_signed));
}

/* The two operands of one word, as one plane wants them. */
INLINE __m256i plane_word(const PlaneMasks *plane, __m256i patterns, __m256i exact, __m256i reduced,
                          __m256i is_wide, int word) {
    if (plane->is_exact)
        return exact;
    const __m256i of_code[WIDE + 1] = {[REDUCED] = reduced,
                                       [NARROW] = _mm256_andnot_si256(is_wide, exact),
                                       [WIDE] = _mm256_and_si256(is_wide, exact),
                                       [EXACT] = exact};
    __m256i value = _mm256_setzero_si256();
    for (int code = EXACT; code <= WIDE; code++)
        if (plane->uses[code]) {
            __m256i mask = double_bytes(look_up(plane->masks[code], patterns), word);
            value = _mm256_or_si256(value, _mm256_and_si256(of_code[code], mask));
        }
    return value;
}

/* The flags of 8 positions. */
INLINE __m128i look_up_flags(const uint32_t flags_of[PATTERNS], __m256i patterns) {
    __m256i flags = look_up(flags_of, patterns);
    return _mm_packus_epi32(_mm256_castsi256_si128(flags), _mm256_extracti128_si256(flags, 1));
}

static void pack_quad(const PackArguments *pack) {
    const SlotRule *rule = pack->rule;
    for (int64_t at = 0; at < pack->positions; at += 32) {
        __m256i quads[4];
        interleave(pack, at, quads);
        for (int quarter = 0; quarter < 4; quarter++) {
            int64_t here = at + quarter * LANES;
            __m256i patterns = nonzero_pattern(quads[quarter]);
            for (int word = 0; pack->flags && word < WORDS; word++)
                _mm_storeu_si128((__m128i *)(pack->flags + word * pack->word_stride + here),
                                 look_up_flags(pack->flags_of, patterns));
            for (int word = 0; word < WORDS; word++) {
                __m256i exact = widen(quads[quarter], word, rule->is_signed);
                __m256i reduced = reduce_words(exact, rule), is_wide = wide_mask(exact, rule->is_signed);
                uint32_t *to = pack->out + word * pack->word_stride + here;
                for (int p = 0; p < pack->plane_count; p++)
                    _mm256_storeu_si256(
                        (__m256i *)(to + p * pack->plane_stride),
                        plane_word(&pack->planes[p], patterns, exact, reduced, is_wide, word));
            }
        }
    }
}

/* ---- counting ---- */

INLINE uint32_t nonzero_bits(__m256i v) {
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256()));
}

INLINE uint32_t wide_bits(__m256i v, bool is_signed) {
    if (is_signed)
        v = _mm256_add_epi8(v, _mm256_set1_epi8(8));
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_min_epu8(v, _mm256_set1_epi8(15)), v));
}

/* Which of up to 64 bytes are not zero, and which are wide. */
INLINE void classify(const uint8_t *bytes, int64_t count, bool is_signed, uint64_t *nonzero, uint64_t *wide) {
    uint8_t tail[64] = {0};
    if (bytes && count < 64)
        memcpy(tail, bytes, (size_t)count);
    const __m256i *from = (const __m256i *)(bytes && count >= 64 ? bytes : tail);
    __m256i low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1);
    *nonzero = nonzero_bits(low) | (uint64_t)nonzero_bits(high) << 32;
    *wide = wide_bits(low, is_signed) | (uint64_t)wide_bits(high, is_signed) << 32;
}

#include "count_slots.h"

/* ---- multiplying ---- */

typedef __m256i Vector;
typedef __m256i Flags;  /* 8 of 32 bits, whose signs are the flag of three of four weights */
typedef __m256i Choice; /* the sign of each lane */

enum { DENSE_CHANNELS = TEAM, DENSE_VECTORS = 2, TEAM_VECTORS = 2, ENTRY_CHAINS = 1 };

INLINE Vector no_sums(void) {
    return _mm256_setzero_si256();
}
INLINE Vector load_sums(const int32_t *sums) {
    return _mm256_load_si256((const __m256i *)sums);
}
INLINE void store_sums(int32_t *to, Vector sums) {
    _mm256_store_si256((__m256i *)to, sums);
}
INLINE Vector add_sums(Vector a, Vector b) {
    return _mm256_add_epi32(a, b);
}
INLINE Vector load_plane(const uint32_t *plane) {
    return _mm256_loadu_si256((const __m256i *)plane);
}
INLINE Vector broadcast(const uint32_t *word) {
    return _mm256_set1_epi32((int)*word);
}
INLINE Vector multiply_add(Vector sums, Vector a, Vector w) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, w));
}
INLINE Vector select_bytes(Vector mask, Vector yes, Vector no) {
    return _mm256_blendv_epi8(no, yes, mask);
}
INLINE Flags load_flags(const uint16_t *flags) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)flags));
}
INLINE Flags broadcast_flag(const uint32_t *word) { /* the shift that makes it the sign */
    return _mm256_set1_epi32((int)*word);
}
INLINE Choice is_raised(Flags flags, Flags flag) {
    return _mm256_sllv_epi32(flags, flag);
}
INLINE Choice three_of_four(Flags flags) {
    return flags;
}
INLINE Vector choose(Choice choice, Vector no, Vector yes) {
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(no), _mm256_castsi256_ps(yes), _mm256_castsi256_ps(choice)));
}
INLINE Vector choose_masked(Choice choice, Vector no, Vector yes, Vector mask) {
    return choose(choice, no, select_bytes(mask, yes, no));
}

/* Contests skip steps, so that the hardware does not foresee what the next will read. Two vectors are a cache
 * line. */
INLINE void prefetch_contests(const uint32_t *plane0, const uint32_t *plane1, const uint16_t *flags,
                              const int vectors) {
    (void)vectors;
    _mm_prefetch((const char *)plane0, _MM_HINT_T0);
    if (plane1)
        _mm_prefetch((const char *)plane1, _MM_HINT_T0);
    _mm_prefetch((const char *)flags, _MM_HINT_T0);
}
INLINE void prefetch_words(const uint32_t *words, const int count) {
    (void)words, (void)count;
}

#include "multiply.h"

/* ---- storing ---- */

/* 8 sums of one channel, dequantised (or as they are): the bits that go to memory. */
INLINE __m256i finish(const Sink *sink, int64_t channel, const int32_t *acc) {
    __m256i sums = load_sums(acc);
    if (!sink->is_float)
        return sums;
    __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(sink->scale[channel]));
    if (sink->bias)
        y = _mm256_add_ps(y, _mm256_set1_ps(sink->bias[channel]));
    if (sink->gain)
        y = _mm256_fmadd_ps(y, _mm256_set1_ps(sink->gain[channel]), _mm256_set1_ps(sink->shift[channel]));
    if (sink->relu)
        y = _mm256_max_ps(_mm256_setzero_ps(), y);
    return _mm256_castps_si256(y);
}

static void store_spans(const StoreArguments *store) {
    for (int c = 0; c < store->channels; c++) {
        int64_t channel = store->first_channel + c;
        int32_t *to = (int32_t *)store->sink->data + channel * store->sink->stride_n;
        for (int i = 0; i < store->span_count; i++) {
            const Span *span = &store->spans[i];
            const int32_t *acc = stored_sums(store, c) + span->first;
            int32_t values[2 * LANES];
            int32_t *out = span->lanes == 0xFFFF ? to + span->to : values;
            _mm256_storeu_si256((__m256i *)out, finish(store->sink, channel, acc));
            _mm256_storeu_si256((__m256i *)(out + LANES), finish(store->sink, channel, acc + LANES));
            if (out != values)
                continue;
            int64_t at = span->to;
            for (unsigned lanes = span->lanes; lanes; lanes &= lanes - 1)
                to[at++] = values[__builtin_ctz(lanes)];
        }
    }
}

/* 8 channels of 8 positions to 8 positions of 8 channels. */
INLINE void transpose_words(__m256i words[8]) {
    __m256i pairs[8], fours[8]; /* fours[4h + j], 128-bit lane i: channels 4h..4h+3 of position 4i + j */
    UNROLL for (int c = 0; c < 8; c += 2) {
        pairs[c] = _mm256_unpacklo_epi32(words[c], words[c + 1]);
        pairs[c + 1] = _mm256_unpackhi_epi32(words[c], words[c + 1]);
    }
    UNROLL for (int h = 0; h < 8; h += 4) {
        fours[h] = _mm256_unpacklo_epi64(pairs[h], pairs[h + 2]);
        fours[h + 1] = _mm256_unpackhi_epi64(pairs[h], pairs[h + 2]);
        fours[h + 2] = _mm256_unpacklo_epi64(pairs[h + 1], pairs[h + 3]);
        fours[h + 3] = _mm256_unpackhi_epi64(pairs[h + 1], pairs[h + 3]);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        words[j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x20);
        words[4 + j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x31);
    }
}

INLINE void store_channels(int32_t *to, const Vector words[16], int lane, int channels) {
    int32_t values[2 * LANES];
    int32_t *out = channels == 16 ? to : values;
    _mm256_storeu_si256((__m256i *)out, words[lane]);
    _mm256_storeu_si256((__m256i *)(out + LANES), words[LANES + lane]);
    if (out == values)
        memcpy(to, values, (size_t)channels * sizeof *to);
}

#include "store.h"

static const VectorOps OPS = {
    .format = {.word_operands = 2, .has_ninth_bit = true, .activations = ANY_SIGN, .flags = FLAG_AS_SHIFT},
    .quantise_row = quantise_row,
    .quantise_pixels = quantise_pixels,
    .transpose_pixels = transpose_pixels,
    .pack = pack_quad,
    .count = count_activations,
    .fold = fold_counts,
    .multiply = multiply_block,
    .correct = NULL, /* an operand has a ninth bit */
    .store = store_tile,
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static bool is_supported(void) {
    __builtin_cpu_init(); /* includes what the operating system saves */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("popcnt");
}

const Path path_avx2 = VECTOR_PATH(PATH_NAME, is_supported, &OPS);

#else

const Path path_avx2 = PATH_NOT_BUILT("avx2");

#endif
