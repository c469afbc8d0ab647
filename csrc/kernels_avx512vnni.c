/* AVX-512 with VNNI: planes of unsigned bytes, 16 positions per vector, vpdpbusd.
 *
 * A lane holds one quad of one position; the weights of that quad are one word, broadcast to all lanes.
 */
#include "engine.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 9)

#include "transpose.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,popcnt,prefer-vector-width=512")
#endif

#include <immintrin.h>
#include <string.h>

enum { LANES = 16 };

#define PATH_NAME "avx512vnni"

INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xFFFF : (__mmask16)((1u << count) - 1);
}

/* ---- quantising ---- */

typedef struct {
    __m512 inverse, low, high;
    __m512 lowest, poison; /* of everything seen so far: the least value; NaN where one was not finite */
} Rounder;

INLINE Rounder make_rounder(const Quantiser *quantiser) {
    return (Rounder){
        _mm512_set1_ps(quantiser->inverse_scale), _mm512_set1_ps(quantiser->is_signed ? -127 : 0),
        _mm512_set1_ps(quantiser->is_signed ? 127 : 255), _mm512_setzero_ps(), _mm512_setzero_ps()};
}

INLINE void note(const Rounder *rounder, Seen *seen) {
    seen->nonfinite |= _mm512_cmp_ps_mask(rounder->poison, rounder->poison, _CMP_UNORD_Q) != 0;
    seen->negative |= _mm512_cmp_ps_mask(rounder->lowest, _mm512_setzero_ps(), _CMP_LT_OQ) != 0;
}

/* 16 floats, scaled and rounded; unsigned ones are clamped from above alone: what is below 0 stays below. */
INLINE __m512i scale_and_round(Rounder *rounder, __m512 x, const bool is_signed) {
    rounder->lowest = _mm512_min_ps(x, rounder->lowest); /* the second, if x is NaN */
    rounder->poison = _mm512_fmadd_ps(x, _mm512_setzero_ps(), rounder->poison);
    __m512 scaled = _mm512_min_ps(_mm512_mul_ps(x, rounder->inverse), rounder->high);
    return _mm512_cvtps_epi32(is_signed ? _mm512_max_ps(scaled, rounder->low) : scaled);
}

/* 16 floats to 16 bytes. */
INLINE __m128i quantise(Rounder *rounder, __m512 x) {
    __m512i rounded = scale_and_round(rounder, x, true); /* low is 0 if unsigned */
    return _mm512_cvtepi32_epi8(rounded);
}

/* Up to 16 floats, every second of memory; nothing behind the last is read. */
INLINE __m512 load_even(const float *from, int64_t count) {
    int64_t floats = 2 * count - 1;
    __m512 low = _mm512_maskz_loadu_ps(first_lanes(floats), from);
    __m512 high = _mm512_setzero_ps();
    if (floats > 16)
        high = _mm512_maskz_loadu_ps(first_lanes(floats - 16), from + 16);
    __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(low, even, high);
}

INLINE __m512 load_strided(const float *from, int64_t stride, int64_t count) {
    float values[LANES] = {0};
    for (int64_t i = 0; i < count && i < LANES; i++)
        values[i] = from[i * stride];
    return _mm512_loadu_ps(values);
}

static void quantise_row(const float *from, int64_t stride, int64_t count, const Quantiser *quantiser,
                         uint8_t *to, Seen *seen) {
    Rounder rounder = make_rounder(quantiser);
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t left = count - i < LANES ? count - i : LANES;
        __m512 x = stride == 1   ? _mm512_maskz_loadu_ps(first_lanes(left), from + i)
                   : stride == 2 ? load_even(from + 2 * i, left)
                                 : load_strided(from + i * stride, stride, left);
        __m128i bytes = quantise(&rounder, x);
        if (left == LANES)
            _mm_storeu_si128((__m128i *)(to + i), bytes);
        else
            _mm_mask_storeu_epi8(to + i, first_lanes(left), bytes);
    }
    note(&rounder, seen);
}

/* Whole vectors wherever possible: masked stores are slow. */
INLINE void store_columns(const __m128i columns[16], int64_t pixels, int64_t channels, uint8_t *to,
                          int64_t channel_stride) {
    if (pixels >= 16 && channels >= 16)
        UNROLL for (int c = 0; c < 16; c++)
            _mm_storeu_si128((__m128i *)(to + c * channel_stride), columns[c]);
    else if (pixels == 8 && channels >= 16)
        UNROLL for (int c = 0; c < 16; c++)
            _mm_storel_epi64((__m128i *)(to + c * channel_stride), columns[c]);
    else
        for (int64_t c = 0; c < channels && c < 16; c++)
            _mm_mask_storeu_epi8(to + c * channel_stride, first_lanes(pixels), columns[c]);
}

/* 16 pixels of 16 channels to 16 bytes a channel:
 *
 *     pixels 4k..4k+3, a vector each    c0 c1 c2 c3 | c4 ..      32 bits each
 *     packed to bytes, lane by lane     p0c0 p0c1 p0c2 p0c3 p1c0 .. p3c3 | ..
 *     shuffled                          p0c0 p1c0 p2c0 p3c0 p0c1 .. | ..     so that a dword is a channel
 *     and the four k interleaved        16 pixels of channel 0 | of channel 4 | 8 | 12,  of 1 | 5 | ..
 */
INLINE void quantise_square(Rounder *rounder, const float *from, int64_t pixel_stride, int64_t pixels,
                            __mmask16 present, const bool is_signed, __m128i columns[16]) {
    const __m512i by_channel =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i fours[4];
    UNROLL for (int k = 0; k < 4; k++) {
        __m512i pixel[4];
        UNROLL for (int i = 0; i < 4; i++) {
            int p = 4 * k + i;
            __m512 x =
                p < pixels ? _mm512_maskz_loadu_ps(present, from + p * pixel_stride) : _mm512_setzero_ps();
            pixel[i] = scale_and_round(rounder, x, is_signed);
        }
        __m512i low = _mm512_packs_epi32(pixel[0], pixel[1]), high = _mm512_packs_epi32(pixel[2], pixel[3]);
        __m512i bytes = is_signed ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
        fours[k] = _mm512_shuffle_epi8(bytes, by_channel);
    }
    __m512i even_low = _mm512_unpacklo_epi32(fours[0], fours[1]);
    __m512i even_high = _mm512_unpacklo_epi32(fours[2], fours[3]);
    __m512i odd_low = _mm512_unpackhi_epi32(fours[0], fours[1]);
    __m512i odd_high = _mm512_unpackhi_epi32(fours[2], fours[3]);
    const __m512i of_remainder[4] = {
        _mm512_unpacklo_epi64(even_low, even_high), _mm512_unpackhi_epi64(even_low, even_high),
        _mm512_unpacklo_epi64(odd_low, odd_high), _mm512_unpackhi_epi64(odd_low, odd_high)};
    UNROLL for (int i = 0; i < 4; i++) {
        columns[i] = _mm512_castsi512_si128(of_remainder[i]);
        columns[4 + i] = _mm512_extracti32x4_epi32(of_remainder[i], 1);
        columns[8 + i] = _mm512_extracti32x4_epi32(of_remainder[i], 2);
        columns[12 + i] = _mm512_extracti32x4_epi32(of_remainder[i], 3);
    }
}

INLINE void quantise_squares(const float *from, int64_t pixel_stride, int64_t count, int64_t channels,
                             const Quantiser *quantiser, uint8_t *to, int64_t channel_stride, Seen *seen,
                             const bool is_signed) {
    Rounder rounder = make_rounder(quantiser);
    int64_t ahead =
        channels < QUANTISE_AHEAD / QUANTISE_AHEAD_PIXELS ? QUANTISE_AHEAD / channels : QUANTISE_AHEAD_PIXELS;
    for (int64_t i = 0; i < count; i += 16)
        for (int64_t c = 0; c < channels; c += 16) {
            const float *square = from + i * pixel_stride + c;
            __m128i columns[16];
            UNROLL for (int p = 0; p < 16; p++)
                _mm_prefetch((const char *)(square + (ahead + p) * pixel_stride), _MM_HINT_T0);
            if (count - i >= 16 && channels - c >= 16)
                quantise_square(&rounder, square, pixel_stride, 16, 0xFFFF, is_signed, columns);
            else
                quantise_square(&rounder, square, pixel_stride, count - i, first_lanes(channels - c),
                                is_signed, columns);
            store_columns(columns, count - i, channels - c, to + c * channel_stride + i, channel_stride);
        }
    note(&rounder, seen);
}

static void quantise_pixels(const float *from, int64_t pixel_stride, int64_t count, int64_t channels,
                            const Quantiser *quantiser, uint8_t *to, int64_t channel_stride, Seen *seen) {
    if (quantiser->is_signed)
        quantise_squares(from, pixel_stride, count, channels, quantiser, to, channel_stride, seen, true);
    else
        quantise_squares(from, pixel_stride, count, channels, quantiser, to, channel_stride, seen, false);
}

static void transpose_pixels(const uint8_t *from, int64_t pixel_stride, int64_t count, int64_t channels,
                             uint8_t *to, int64_t channel_stride) {
    for (int64_t i = 0; i < count; i += 16)
        for (int64_t c = 0; c < channels; c += 16) {
            __mmask16 present = first_lanes(channels - c);
            __m128i rows[16];
            UNROLL for (int p = 0; p < 16; p++) rows[p] =
                i + p < count ? _mm_maskz_loadu_epi8(present, from + (i + p) * pixel_stride + c)
                              : _mm_setzero_si128();
            transpose_bytes(rows);
            store_columns(rows, count - i, channels - c, to + c * channel_stride + i, channel_stride);
        }
}

/* ---- packing ---- */

/* 64 positions of four channels, byte by byte, to four vectors of 16 quads. */
INLINE void interleave(const PackArguments *pack, int64_t at, __m512i quads[4]) {
    __m512i c[QUAD];
    UNROLL for (int byte = 0; byte < QUAD; byte++) c[byte] =
        pack->channel[byte] ? _mm512_loadu_si512(pack->channel[byte] + at) : _mm512_setzero_si512();
    __m512i low01 = _mm512_unpacklo_epi8(c[0], c[1]), high01 = _mm512_unpackhi_epi8(c[0], c[1]);
    __m512i low23 = _mm512_unpacklo_epi8(c[2], c[3]), high23 = _mm512_unpackhi_epi8(c[2], c[3]);
    /* Part k holds positions 4k..4k+3 of each 16: transpose the 4 x 4 matrix of 128-bit lanes. */
    __m512i part0 = _mm512_unpacklo_epi16(low01, low23), part1 = _mm512_unpackhi_epi16(low01, low23);
    __m512i part2 = _mm512_unpacklo_epi16(high01, high23), part3 = _mm512_unpackhi_epi16(high01, high23);
    __m512i even01 = _mm512_shuffle_i32x4(part0, part1, 0x88),
            odd01 = _mm512_shuffle_i32x4(part0, part1, 0xDD);
    __m512i even23 = _mm512_shuffle_i32x4(part2, part3, 0x88),
            odd23 = _mm512_shuffle_i32x4(part2, part3, 0xDD);
    quads[0] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    quads[1] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    quads[2] = _mm512_shuffle_i32x4(even01, even23, 0xDD);
    quads[3] = _mm512_shuffle_i32x4(odd01, odd23, 0xDD);
}

/* Bit b of a lane: byte b is not zero. */
INLINE __m512i nonzero_pattern(__m512i quad) {
    __m512i ones = _mm512_min_epu8(quad, _mm512_set1_epi8(1));
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_set1_epi32(0x08040201));
}

INLINE __mmask64 wide_bytes(__m512i quad, bool is_signed) {
    if (is_signed)
        return _mm512_cmpgt_epu8_mask(_mm512_add_epi8(quad, _mm512_set1_epi8(8)), _mm512_set1_epi8(15));
    return _mm512_cmpgt_epu8_mask(quad, _mm512_set1_epi8(15));
}

/* Bytes whose reduced value needs nine bits (256, or +128). */
INLINE __mmask64 overflowing_bytes(__m512i quad, bool is_signed) {
    return is_signed ? _mm512_cmpgt_epi8_mask(quad, _mm512_set1_epi8(119))
                     : _mm512_cmpgt_epu8_mask(quad, _mm512_set1_epi8((char)247));
}

/* The 4 high bits, rounded, of wide bytes (of all under policy S); one short where nine bits are needed. */
INLINE __m512i reduce_bytes(__m512i quad, const SlotRule *rule) {
    const __m512i high_bits = _mm512_set1_epi8((char)0xF0);
    __m512i rounded = quad;
    if (!rule->truncate) {
        __m512i is_odd = _mm512_and_si512(_mm512_srli_epi16(quad, 4), _mm512_set1_epi8(1));
        __m512i up = _mm512_add_epi8(is_odd, _mm512_set1_epi8(7));
        rounded = rule->is_signed ? _mm512_adds_epi8(quad, up) : _mm512_adds_epu8(quad, up);
    }
    rounded = _mm512_and_si512(rounded, high_bits);
    if (!rule->truncate && !rule->saturate)
        rounded = _mm512_mask_mov_epi8(rounded, overflowing_bytes(quad, rule->is_signed),
                                       _mm512_set1_epi8((char)(rule->is_signed ? 127 : 255)));
    if (rule->reduces_always)
        return rounded;
    return _mm512_mask_mov_epi8(quad, wide_bytes(quad, rule->is_signed), rounded);
}

/* Note the overflowing bytes of 16 positions. */
static void record_events(const PackArguments *pack, int64_t at, uint64_t bytes, __m512i patterns) {
    uint32_t pattern[LANES];
    _mm512_storeu_si512(pattern, patterns);
    Events *events = pack->events;
    int64_t index = atomic_fetch_add(&events->count, __builtin_popcountll(bytes));
    for (; bytes && index < events->capacity; bytes &= bytes - 1, index++) {
        int bit = __builtin_ctzll(bytes);
        events->list[index] = (Event){(int32_t)(at + bit / QUAD), pack->phase, pack->quad,
                                      (uint8_t)(bit % QUAD), (uint8_t)pattern[bit / QUAD]};
    }
}

/* The bytes of each quad that a plane takes from one kind of value. */
INLINE __m512i chosen(const PlaneMasks *plane, Code code, __m512i patterns, __m512i value) {
    return _mm512_and_si512(value,
                            _mm512_permutexvar_epi32(patterns, _mm512_loadu_si512(plane->masks[code])));
}

static void pack_quad(const PackArguments *pack) {
    const SlotRule *rule = pack->rule;
    const __m512i flip = _mm512_set1_epi8((char)pack->flip);
    bool reduces = false, uses_width = false;
    for (int p = 0; p < pack->plane_count; p++) {
        reduces |= pack->planes[p].uses[REDUCED];
        uses_width |= pack->planes[p].uses[NARROW] || pack->planes[p].uses[WIDE];
    }
    for (int64_t at = 0; at < pack->positions; at += GRAIN) {
        __m512i quads[4];
        interleave(pack, at, quads);
        for (int quarter = 0; quarter < 4; quarter++) {
            __m512i exact = quads[quarter], patterns = nonzero_pattern(exact), reduced = exact;
            __m512i narrow = exact, wide = exact;
            int64_t here = at + quarter * LANES;
            if (reduces)
                reduced = reduce_bytes(exact, rule);
            if (uses_width) {
                wide = _mm512_maskz_mov_epi8(wide_bytes(exact, rule->is_signed), exact);
                narrow = _mm512_xor_si512(exact, wide);
            }
            if (pack->events) {
                uint64_t bytes = overflowing_bytes(exact, rule->is_signed);
                if (bytes)
                    record_events(pack, here, bytes, patterns);
            }
            if (pack->is_excess) {
                reduced = _mm512_maskz_set1_epi8(overflowing_bytes(exact, rule->is_signed), 1);
                exact = narrow = wide = _mm512_setzero_si512();
            }
            if (pack->flags)
                _mm256_storeu_si256((__m256i *)(pack->flags + here),
                                    _mm512_cvtepi32_epi16(_mm512_permutexvar_epi32(
                                        patterns, _mm512_loadu_si512(pack->flags_of))));
            for (int p = 0; p < pack->plane_count; p++) {
                const PlaneMasks *plane = &pack->planes[p];
                __m512i value = exact;
                if (!plane->is_exact) {
                    value = chosen(plane, EXACT, patterns, exact);
                    if (plane->uses[REDUCED])
                        value = _mm512_or_si512(value, chosen(plane, REDUCED, patterns, reduced));
                    if (plane->uses[NARROW])
                        value = _mm512_or_si512(value, chosen(plane, NARROW, patterns, narrow));
                    if (plane->uses[WIDE])
                        value = _mm512_or_si512(value, chosen(plane, WIDE, patterns, wide));
                }
                _mm512_storeu_si512(pack->out + p * pack->plane_stride + here, _mm512_xor_si512(value, flip));
            }
        }
    }
}

/* ---- counting ---- */

/* Which of up to 64 bytes are not zero, and which are wide. */
INLINE void classify(const uint8_t *bytes, int64_t count, bool is_signed, uint64_t *nonzero, uint64_t *wide) {
    *nonzero = *wide = 0;
    if (!bytes)
        return;
    __m512i v = count >= 64 ? _mm512_loadu_si512(bytes) : _mm512_maskz_loadu_epi8((1ull << count) - 1, bytes);
    *nonzero = _mm512_test_epi8_mask(v, v);
    *wide = wide_bytes(v, is_signed);
}

#include "count_slots.h"

/* ---- multiplying ---- */

typedef __m512i Vector;
typedef __m256i Flags; /* 16 of 16 bits */
typedef __mmask16 Choice;

enum {
    DENSE_CHANNELS = BLOCK,
    DENSE_VECTORS = 2,
    TEAM_VECTORS = 4,
    ENTRY_CHAINS = 2,
    SELECT = 0xCA, /* for ternary logic: A ? B : C */
};
#define FEW 4 /* positions that are multiplied together where lanes are channels */

/* Keep the compiler from folding a broadcast into a masked load, which costs a register move and a merge. */
INLINE Vector in_register(Vector value) {
    __asm__("" : "+v"(value));
    return value;
}

INLINE Vector no_sums(void) {
    return _mm512_setzero_si512();
}
INLINE Vector load_sums(const int32_t *sums) {
    return _mm512_load_si512(sums);
}
INLINE void store_sums(int32_t *to, Vector sums) {
    _mm512_store_si512(to, sums);
}
INLINE Vector add_sums(Vector a, Vector b) {
    return _mm512_add_epi32(a, b);
}
INLINE Vector load_plane(const uint32_t *plane) {
    return _mm512_loadu_si512(plane);
}
INLINE Vector broadcast(const uint32_t *word) {
    return in_register(_mm512_set1_epi32((int)*word));
}
INLINE Vector multiply_add(Vector sums, Vector a, Vector w) {
    return _mm512_dpbusd_epi32(sums, a, w);
}
INLINE Vector select_bytes(Vector mask, Vector yes, Vector no) {
    return _mm512_ternarylogic_epi32(mask, yes, no, SELECT);
}
INLINE Flags load_flags(const uint16_t *flags) {
    return _mm256_loadu_si256((const __m256i *)flags);
}
INLINE Flags broadcast_flag(const uint32_t *word) { /* in both of its halves */
    return _mm256_set1_epi32((int)*word);
}
INLINE Choice is_raised(Flags flags, Flags flag) {
    return _mm256_test_epi16_mask(flags, flag);
}
INLINE Choice three_of_four(Flags flags) {
    return is_raised(flags, _mm256_set1_epi16((int16_t)THREE_FLAG[15]));
}
INLINE Vector choose(Choice choice, Vector no, Vector yes) {
    return _mm512_mask_blend_epi32(choice, no, yes);
}
INLINE Vector choose_masked(Choice choice, Vector no, Vector yes, Vector mask) {
    enum { SELECT_BY_LAST = 0xD8 }; /* C ? B : A */
    return _mm512_mask_ternarylogic_epi32(no, choice, yes, mask, SELECT_BY_LAST);
}

/* Contests skip steps, so that the hardware does not foresee what the next will read. */
INLINE void prefetch_contests(const uint32_t *plane0, const uint32_t *plane1, const uint16_t *flags,
                              const int vectors) {
    UNROLL for (int v = 0; v < vectors; v++) {
        _mm_prefetch(plane0 + v * LANES, _MM_HINT_T0);
        if (plane1)
            _mm_prefetch(plane1 + v * LANES, _MM_HINT_T0);
    }
    _mm_prefetch(flags, _MM_HINT_T0);
}
INLINE void prefetch_words(const uint32_t *words, const int count) {
    UNROLL for (int line = 0; line < (count + 15) / 16; line++) _mm_prefetch(words + 16 * line, _MM_HINT_T1);
}

/* The words of one position in all lanes, or of two in a half each. */
INLINE __m256i spread(const uint32_t *plane, const int together) {
    __m256i one = _mm256_set1_epi32((int)plane[0]);
    return together == 2 ? _mm256_inserti128_si256(one, _mm_set1_epi32((int)plane[1]), 1) : one;
}

INLINE __m256i spread_flags(const uint16_t *flags, const int together) {
    __m256i one = _mm256_set1_epi16((int16_t)flags[0]);
    return together == 2 ? _mm256_inserti128_si256(one, _mm_set1_epi16((int16_t)flags[1]), 1) : one;
}

/* Word `which` of all channels. */
INLINE __m256i side_by_side(const uint32_t *word, const int which, const bool contests) {
    if (contests)
        return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(word + which * TEAM)));
    return _mm256_loadu_si256((const __m256i *)(word + which * BLOCK));
}

/* The same for the last few positions: the lanes are channels, whose words lie side by side in the stream, so
 * that none is idle. */
INLINE void multiply_few(const MultiplyArguments *multiply, const Stream *stream, int first, int64_t at,
                         const int positions, const Form form, const bool spares) {
    const Layer *layer = multiply->layer;
    const int words = form_words(form, spares), side = form_channels(form);
    const bool selects = form == FORM_SELECT || (form == FORM_FULL && spares);
    const bool contests = form == FORM_FULL || form == FORM_MIXED;
    const int together = positions > 1 ? BLOCK / side : 1, vectors = positions / together;
    const uint32_t *planes = multiply->planes + at;
    const uint32_t *plane0 = planes + plane_of_form(layer, form, 0) * multiply->plane_stride;
    const uint32_t *plane1 = planes + plane_of_form(layer, form, 1) * multiply->plane_stride;
    const uint16_t *flags = contests ? multiply->flags + at : NULL;
    const uint32_t *word = stream->words;
    const __m256i three_of_four = _mm256_set1_epi16((int16_t)THREE_FLAG[15]);
    __m256i acc[FEW];
    UNROLL for (int i = 0; i < vectors; i++) acc[i] = _mm256_setzero_si256();
    for (int64_t step = 0; step < stream->steps; step++, word += words * side) {
        int64_t offset = multiply->step_offset[stream->order[step]];
        UNROLL for (int i = 0; i < vectors; i++) {
            int64_t here = offset + i * together;
            __m256i a = spread(plane0 + here, together), w = side_by_side(word, 0, contests), met = a;
            if (selects || form == FORM_MIXED)
                met = spread(plane1 + here, together);
            if (selects)
                a = _mm256_ternarylogic_epi32(side_by_side(word, words - 1, contests), met, a, SELECT);
            __m256i raised = contests ? spread_flags(flags + here, together) : a;
            if (form == FORM_FULL)
                w = _mm256_mask_mov_epi32(w, _mm256_test_epi32_mask(raised, three_of_four),
                                          side_by_side(word, 1, true));
            if (form == FORM_MIXED) {
                __m256i reduced = met;
                __mmask8 crowded = _mm256_test_epi32_mask(raised, side_by_side(word, 3, true));
                if (spares)
                    met = _mm256_ternarylogic_epi32(side_by_side(word, words - 1, true), reduced, a, SELECT);
                __mmask8 reduces = _mm256_test_epi32_mask(raised, side_by_side(word, 2, true));
                a = _mm256_mask_mov_epi32(a, reduces, met);
                if (spares)
                    a = _mm256_mask_mov_epi32(a, crowded, reduced);
                w = _mm256_mask_mov_epi32(w, crowded, side_by_side(word, 1, true));
            }
            acc[i] = _mm256_dpbusd_epi32(acc[i], a, w);
        }
    }
    UNROLL for (int i = 0; i < vectors; i++) {
        int32_t sums[BLOCK];
        _mm256_storeu_si256((__m256i *)sums, acc[i]);
        for (int lane = 0; lane < side * together; lane++)
            multiply->acc[first + lane % side][at + i * together + lane / side] += sums[lane];
    }
}

#include "multiply.h"

/* The weight that thread `byte` meets where its activation was reduced; 0 where it was not. */
INLINE __m512i met_weight(__m512i raw, const Event *event, const SlotRule *rule) {
    int threads = rule->threads, first = event->byte / threads * threads;
    uint32_t slot = threads == 4 ? 0xFFFFFFFF : 0xFFFFu << (8 * first), active = 0;
    for (int byte = 0; byte < QUAD; byte++)
        active |= (uint32_t)(event->pattern >> byte & 1) << (8 * byte);
    __m512i weight = _mm512_srai_epi32(_mm512_sll_epi32(raw, _mm_cvtsi32_si128(24 - 8 * event->byte)), 24);
    __m512i pairs =
        _mm512_and_si512(_mm512_min_epu8(raw, _mm512_set1_epi8(1)), _mm512_set1_epi32((int)(active & slot)));
    __m512i contenders = rule->skips_zeros
                             ? _mm512_dpbusd_epi32(_mm512_setzero_si512(), pairs, _mm512_set1_epi8(1))
                             : _mm512_set1_epi32(threads);
    __mmask16 is_wide =
        _mm512_cmpgt_epu32_mask(_mm512_add_epi32(weight, _mm512_set1_epi32(8)), _mm512_set1_epi32(15));
    __m512i is_odd = _mm512_and_si512(_mm512_srai_epi32(weight, 4), _mm512_set1_epi32(1));
    __m512i reduced = _mm512_and_si512(
        _mm512_add_epi32(weight, _mm512_add_epi32(is_odd, _mm512_set1_epi32(7))), _mm512_set1_epi32(-16));
    __mmask16 is_reducible = rule->reduces_always ? 0xFFFF : is_wide;
    __mmask16 at_more = _mm512_cmpge_epi32_mask(contenders, _mm512_set1_epi32(3));
    __mmask16 at_two = _mm512_cmpeq_epi32_mask(contenders, _mm512_set1_epi32(2));
    if (rule->reduces_weight)
        at_two = 0;
    if (rule->needs_both)
        at_two &= is_wide;
    __m512i met = _mm512_maskz_mov_epi32(at_two, weight);
    met = _mm512_mask_mov_epi32(met, at_more, weight);
    return _mm512_mask_mov_epi32(met, at_more & is_reducible, reduced);
}

static void correct_sums(const uint32_t *raw, int64_t count, const Event *event, const SlotRule *rule,
                         int32_t *sums) {
    for (int64_t n = 0; n < count; n += LANES) {
        __mmask16 present = first_lanes(count - n);
        __m512i weights = met_weight(_mm512_maskz_loadu_epi32(present, raw + n), event, rule);
        __m512i sum = _mm512_maskz_loadu_epi32(present, sums + n);
        _mm512_mask_storeu_epi32(sums + n, present, _mm512_add_epi32(sum, weights));
    }
}

/* ---- storing ---- */

/* 16 sums of one channel, dequantised (or as they are): the bits that go to memory. */
INLINE __m512i finish(const Sink *sink, int64_t channel, const int32_t *acc) {
    __m512i sums = _mm512_load_si512(acc);
    if (!sink->is_float)
        return sums;
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(sink->scale[channel]));
    if (sink->bias)
        y = _mm512_add_ps(y, _mm512_set1_ps(sink->bias[channel]));
    if (sink->gain)
        y = _mm512_fmadd_ps(y, _mm512_set1_ps(sink->gain[channel]), _mm512_set1_ps(sink->shift[channel]));
    if (sink->relu)
        y = _mm512_max_ps(_mm512_setzero_ps(), y);
    return _mm512_castps_si512(y);
}

static void store_spans(const StoreArguments *store) {
    for (int c = 0; c < store->channels; c++) {
        int64_t channel = store->first_channel + c;
        int32_t *to = (int32_t *)store->sink->data + channel * store->sink->stride_n;
        int sixteen = -1;
        __m512i y = _mm512_setzero_si512();
        for (int i = 0; i < store->span_count; i++) {
            const Span *span = &store->spans[i];
            if (span->first != sixteen)
                y = finish(store->sink, channel, stored_sums(store, c) + span->first);
            sixteen = span->first;
            if (span->lanes == 0xFFFF)
                _mm512_storeu_si512(to + span->to, y);
            else
                _mm512_mask_storeu_epi32(to + span->to, first_lanes(__builtin_popcount(span->lanes)),
                                         _mm512_maskz_compress_epi32(span->lanes, y));
        }
    }
}

/* 16 channels of 16 positions to 16 positions of 16 channels. */
INLINE void transpose_words(__m512i words[16]) {
    __m512i pairs[16], fours[16]; /* fours[4h + j], 128-bit lane i: channels 4h..4h+3 of position 4i + j */
    UNROLL for (int c = 0; c < 16; c += 2) {
        pairs[c] = _mm512_unpacklo_epi32(words[c], words[c + 1]);
        pairs[c + 1] = _mm512_unpackhi_epi32(words[c], words[c + 1]);
    }
    UNROLL for (int h = 0; h < 16; h += 4) {
        fours[h] = _mm512_unpacklo_epi64(pairs[h], pairs[h + 2]);
        fours[h + 1] = _mm512_unpackhi_epi64(pairs[h], pairs[h + 2]);
        fours[h + 2] = _mm512_unpacklo_epi64(pairs[h + 1], pairs[h + 3]);
        fours[h + 3] = _mm512_unpackhi_epi64(pairs[h + 1], pairs[h + 3]);
    }
    UNROLL for (int j = 0; j < 4; j++) { /* 4 x 4 lanes of 128 bits */
        __m512i even_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xDD);
        __m512i even_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
        __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xDD);
        words[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        words[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        words[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
        words[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
    }
}

INLINE void store_channels(int32_t *to, const Vector words[16], int lane, int channels) {
    if (channels == 16)
        _mm512_storeu_si512(to, words[lane]);
    else
        _mm512_mask_storeu_epi32(to, first_lanes(channels), words[lane]);
}

#include "store.h"

static const VectorOps OPS = {
    .format = {.word_operands = 4, .has_ninth_bit = false, .activations = UNSIGNED, .flags = FLAG_AS_BIT},
    .quantise_row = quantise_row,
    .quantise_pixels = quantise_pixels,
    .transpose_pixels = transpose_pixels,
    .pack = pack_quad,
    .count = count_activations,
    .fold = fold_counts,
    .multiply = multiply_block,
    .correct = correct_sums,
    .store = store_tile,
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static bool is_supported(void) {
    __builtin_cpu_init(); /* includes what the operating system saves */
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("popcnt");
}

const Path path_avx512vnni = VECTOR_PATH(PATH_NAME, is_supported, &OPS);

#else

const Path path_avx512vnni = PATH_NOT_BUILT("avx512vnni");

#endif
