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

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

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

INLINE __m256i load_word(const uint32_t *word) {
    return _mm256_set1_epi32((int)*word);
}

INLINE __m256i load_acc(const int32_t *acc) {
    return _mm256_load_si256((const __m256i *)acc);
}

INLINE __m256i load_plane(const uint32_t *plane) {
    return _mm256_loadu_si256((const __m256i *)plane);
}

/* Lanes of the second whose selector's sign is set, else of the first. */
INLINE __m256i blend_by_sign(__m256i first, __m256i second, __m256i selector) {
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second),
                                                _mm256_castsi256_ps(selector)));
}

/* A dense stream: the accumulators of as many channels as share contests stay in registers over all steps. */
INLINE void gemm_s16s16s32(const MultiplyArguments *multiply, const Stream *stream, int first, int64_t at,
                           const int vectors, const Form form, const bool spares) {
    const Layer *layer = multiply->layer;
    const int words = form_words(form, spares), side = form_channels(form);
    const bool selects = form == FORM_SELECT || (form == FORM_FULL && spares);
    const bool contests = form == FORM_FULL || form == FORM_MIXED;
    const uint32_t *planes = multiply->planes + at;
    const uint32_t *plane0 = planes + plane_of_form(layer, form, 0) * multiply->plane_stride;
    const uint32_t *plane1 = planes + plane_of_form(layer, form, 1) * multiply->plane_stride;
    const uint16_t *flags = contests ? multiply->flags + at : NULL;
    const uint32_t *word = stream->words + (contests ? 0 : first);
    __m256i acc[TEAM][2];
    UNROLL for (int c = 0; c < TEAM; c++) UNROLL for (int v = 0; v < vectors; v++) acc[c][v] =
        load_acc(&multiply->acc[first + c][at + v * LANES]);
    const uint32_t *offsets = multiply->step_offset + stream->order[0]; /* without contests, in order */
    uint32_t coming[AHEAD + 1];
    UNROLL for (int i = 0; i < AHEAD; i++) coming[i + 1] = multiply->step_offset[stream->order[i]];
    for (int64_t i = 0; i < stream->steps; i++, word += words * side) {
        UNROLL for (int j = 0; j < AHEAD; j++) coming[j] = coming[j + 1];
        int64_t offset = contests ? coming[0] : offsets[i];
        if (contests) {
            int64_t ahead = coming[AHEAD] = multiply->step_offset[stream->order[i + AHEAD]];
            _mm_prefetch((const char *)(plane0 + ahead), _MM_HINT_T0);
            if (selects || form == FORM_MIXED)
                _mm_prefetch((const char *)(plane1 + ahead), _MM_HINT_T0);
            _mm_prefetch((const char *)(flags + ahead), _MM_HINT_T0);
        }
        __m256i a0[2], a1[2], raised[2], crowded[2];
        UNROLL for (int v = 0; v < vectors; v++) {
            a0[v] = load_plane(plane0 + offset + v * LANES);
            if (selects || form == FORM_MIXED)
                a1[v] = load_plane(plane1 + offset + v * LANES);
            if (contests) /* the sign is the flag of three of four weights */
                raised[v] = crowded[v] =
                    _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(flags + offset + v * LANES)));
        }
        UNROLL for (int c = 0; c < TEAM; c++) {
            __m256i w = load_word(word + c), w4 = w, mask = w, two = w, three = w;
            if (contests)
                w4 = load_word(word + side + c);
            if (form == FORM_MIXED) {
                two = load_word(word + 2 * side + c);
                three = load_word(word + 3 * side + c);
            }
            if (selects || spares)
                mask = load_word(word + (words - 1) * side + c);
            UNROLL for (int v = 0; v < vectors; v++) {
                __m256i a = selects ? _mm256_blendv_epi8(a0[v], a1[v], mask) : a0[v];
                if (form == FORM_MIXED) {
                    crowded[v] = _mm256_sllv_epi32(raised[v], three);
                    __m256i met = spares ? _mm256_blendv_epi8(a, a1[v], mask) : a1[v];
                    a = blend_by_sign(a, met, _mm256_sllv_epi32(raised[v], two));
                    a = spares ? blend_by_sign(a, a1[v], crowded[v]) : a;
                }
                __m256i b = contests ? blend_by_sign(w, w4, crowded[v]) : w;
                acc[c][v] = _mm256_add_epi32(acc[c][v], _mm256_madd_epi16(a, b));
            }
        }
    }
    UNROLL for (int c = 0; c < TEAM; c++) UNROLL for (int v = 0; v < vectors; v++)
        _mm256_store_si256((__m256i *)&multiply->acc[first + c][at + v * LANES], acc[c][v]);
}

INLINE void multiply_strip(const MultiplyArguments *multiply, const Stream *strip, int first, const Form form,
                           const bool spares) {
    int at = 0;
    for (; at + LANES < multiply->positions; at += 2 * LANES)
        gemm_s16s16s32(multiply, strip, first, at, 2, form, spares);
    if (at < multiply->positions)
        gemm_s16s16s32(multiply, strip, first, at, 1, form, spares);
}

/* Strip by strip, so that words stay in the first-level cache from one group of positions to the next. */
INLINE void multiply_stream(const MultiplyArguments *multiply, const Stream *stream, int first,
                            const Form form, const bool spares) {
    const int words = form_words(form, spares) * form_channels(form);
    for (int64_t step = 0; step < stream->steps; step += STRIP_WORDS / words) {
        int64_t left = stream->steps - step;
        Stream strip = {stream->order + step, left < STRIP_WORDS / words ? left : STRIP_WORDS / words,
                        stream->words + step * words};
        multiply_strip(multiply, &strip, first, form, spares);
    }
}

/* The entries of one channel. */
INLINE void spmv_s16s16s32(const MultiplyArguments *multiply, int channel, int at, const int vectors) {
    const int64_t *first = multiply->first_entry + channel * multiply->layer->chunks;
    const Entry *entry = multiply->layer->entries + first[0], *end = multiply->layer->entries + first[1];
    const uint32_t *planes = multiply->planes + at;
    __m256i acc[8];
    UNROLL for (int v = 0; v < vectors; v++) acc[v] = load_acc(&multiply->acc[channel][at + v * LANES]);
    for (; entry < end; entry++) {
        const uint32_t *a = planes + (entry->where >> STEP_BITS) * multiply->plane_stride +
                            multiply->step_offset[entry->where & ((1u << STEP_BITS) - 1)];
        __m256i w = load_word(&entry->word);
        UNROLL for (int v = 0; v < vectors; v++) acc[v] =
            _mm256_add_epi32(acc[v], _mm256_madd_epi16(load_plane(a + v * LANES), w));
    }
    UNROLL for (int v = 0; v < vectors; v++)
        _mm256_store_si256((__m256i *)&multiply->acc[channel][at + v * LANES], acc[v]);
}

static void multiply_entries(const MultiplyArguments *multiply, int channel) {
    const int64_t *first = multiply->first_entry + channel * multiply->layer->chunks;
    if (first[0] == first[1])
        return;
    int vectors = (multiply->positions + LANES - 1) / LANES, at = 0;
    for (; vectors >= 8; vectors -= 8, at += 8 * LANES)
        spmv_s16s16s32(multiply, channel, at, 8);
    for (; vectors >= 4; vectors -= 4, at += 4 * LANES)
        spmv_s16s16s32(multiply, channel, at, 4);
    for (; vectors > 0; vectors--, at += LANES)
        spmv_s16s16s32(multiply, channel, at, 1);
}

/* A team: half of the block. */
static void multiply_team(const MultiplyArguments *multiply, int team) {
    const Stream *all = multiply->streams[0], *own = multiply->streams[team];
    const bool spares = multiply->layer->rule.needs_both;
    int first = team * TEAM;
    switch (multiply->layer->form) {
    case FORM_PLAIN:
        multiply_stream(multiply, all, first, FORM_PLAIN, false);
        break;
    case FORM_SELECT:
        multiply_stream(multiply, all, first, FORM_SELECT, false);
        break;
    case FORM_FULL:
    case FORM_MIXED:
        if (spares) {
            multiply_stream(multiply, &own[FULL], first, FORM_FULL, true);
            multiply_stream(multiply, &own[MIXED], first, FORM_MIXED, true);
        } else {
            multiply_stream(multiply, &own[FULL], first, FORM_FULL, false);
            multiply_stream(multiply, &own[MIXED], first, FORM_MIXED, false);
        }
        break;
    case FORM_NONE:
        break;
    }
}

static void multiply_block(const MultiplyArguments *multiply) {
    for (int team = 0; team < TEAMS; team++)
        multiply_team(multiply, team);
    for (int c = 0; c < multiply->channels; c++)
        multiply_entries(multiply, c);
}

/* ---- storing ---- */

/* 8 sums of one channel, dequantised (or as they are): the bits that go to memory. */
INLINE __m256i finish(const Sink *sink, int64_t channel, const int32_t *acc) {
    __m256i sums = load_acc(acc);
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

/* A position at a time; both halves of a cache line follow each other. */
static void store_lanes(const StoreArguments *store) {
    int32_t *data = (int32_t *)store->sink->data + store->first_channel * store->sink->stride_n;
    for (int at = 0; at < store->positions; at += LANES) {
        __m256i words[STORED][BLOCK];
        for (int half = 0; half < STORED; half++) {
            for (int c = 0; c < BLOCK; c++) {
                int channel = half * BLOCK + c;
                words[half][c] = channel < store->channels
                                     ? finish(store->sink, store->first_channel + channel,
                                              stored_sums(store, channel) + at)
                                     : _mm256_setzero_si256();
            }
            transpose_words(words[half]);
        }
        for (int lane = 0; lane < LANES; lane++) {
            if (store->lane_to[at + lane] == NOWHERE)
                continue;
            int32_t *to = data + store->lane_to[at + lane];
            if (store->channels == STORED * BLOCK && store->sink->stride_n == 1) {
                _mm256_storeu_si256((__m256i *)to, words[0][lane]);
                _mm256_storeu_si256((__m256i *)(to + BLOCK), words[1][lane]);
                continue;
            }
            int32_t values[STORED * BLOCK];
            _mm256_storeu_si256((__m256i *)values, words[0][lane]);
            _mm256_storeu_si256((__m256i *)(values + BLOCK), words[1][lane]);
            for (int c = 0; c < store->channels; c++)
                to[c * store->sink->stride_n] = values[c];
        }
    }
}

static void store_tile(const StoreArguments *store) {
    if (store->sink->stride_w == 1)
        store_spans(store);
    else
        store_lanes(store);
}

static const VectorOps OPS = {.word_operands = 2,
                              .quantise_row = quantise_row,
                              .quantise_pixels = quantise_pixels,
                              .transpose_pixels = transpose_pixels,
                              .pack = pack_quad,
                              .count = count_activations,
                              .fold = fold_counts,
                              .multiply = multiply_block,
                              .correct = NULL, /* no activation needs more than 16 bits */
                              .store = store_tile};

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

static bool run(const Layer *layer, const Source *source, const Sink *sink, int cpu_threads, bool count,
                Outcome *outcome) {
    return engine_run(&OPS, layer, source, sink, cpu_threads, count, outcome);
}

static Layer *pack_layer(const ConvShape *shape, const SlotRule *rule, const int8_t *weights,
                         const int32_t *k_of) {
    return program_pack(shape, rule, weights, k_of, OPS.word_operands);
}

#else

static bool is_supported(void) {
    return false;
}
static Layer *pack_layer(const ConvShape *shape, const SlotRule *rule, const int8_t *weights,
                         const int32_t *k_of) {
    (void)shape, (void)rule, (void)weights, (void)k_of;
    return NULL;
}
static bool run(const Layer *layer, const Source *source, const Sink *sink, int cpu_threads, bool count,
                Outcome *outcome) {
    (void)layer, (void)source, (void)sink, (void)cpu_threads, (void)count, (void)outcome;
    return false;
}

#endif

const Path path_avx2 = {"avx2", is_supported, pack_layer, run, program_bytes, program_release};
