/* Streams and entries times planes: the loops that every vector path compiles for itself, behind its own
 * primitives, as primitive operations of its own width:
 *
 *     Vector     LANES sums, or the words of LANES positions: load_sums, store_sums, load_plane,
 *                no_sums, add_sums
 *                broadcast(word)               one word in all lanes, in a register
 *                multiply_add(sums, a, w)      the dot products of the lanes' operands, added
 *                select_bytes(mask, yes, no)   bit by bit
 *     Flags      the flags of LANES positions: load_flags; or one flag for all of them: broadcast_flag
 *     Choice     yes or no for each lane: is_raised(flags, flag), three_of_four(flags)
 *                choose(choice, no, yes)       lane by lane
 *                choose_masked(choice, no, yes, mask)   the same, for the bits in the mask
 *     prefetch_contests(plane0, plane1 or NULL, flags, vectors)   ask for what a step ahead will read
 *     prefetch_words(words, count)             ask for words of the next strip, or do nothing
 *
 * and the shape of its registers:
 *
 *     DENSE_CHANNELS    channels of a block whose sums stay in registers, in FORM_PLAIN and FORM_SELECT
 *     DENSE_VECTORS     vectors of positions beside them; TEAM_VECTORS: the same for contests
 *     ENTRY_CHAINS      sums of entries that are kept apart, 1 or 2, to hide latency
 *     FEW               if defined: so many last positions go to multiply_few, whose lanes are channels
 */

/* A dense stream: the sums of its channels, of `vectors` each, stay in registers over all steps. */
INLINE void multiply_steps(const MultiplyArguments *multiply, const Stream *stream, int first, int64_t at,
                           const int vectors, const Form form, const bool spares) {
    const Layer *layer = multiply->layer;
    const int words = form_words(form, spares), side = form_channels(form);
    const int channels = side < DENSE_CHANNELS ? side : DENSE_CHANNELS;
    const bool selects = form == FORM_SELECT || (form == FORM_FULL && spares);
    const bool contests = form == FORM_FULL || form == FORM_MIXED, has_two = selects || form == FORM_MIXED;
    const uint32_t *planes = multiply->planes + at;
    const uint32_t *plane0 = planes + plane_of_form(layer, form, 0) * multiply->plane_stride;
    const uint32_t *plane1 = planes + plane_of_form(layer, form, 1) * multiply->plane_stride;
    const uint16_t *flags = contests ? multiply->flags + at : NULL;
    /* Keep the compiler from adding `at` anew at every step. */
    __asm__("" : "+r"(plane0), "+r"(plane1), "+r"(flags));
    const uint32_t *word = stream->words + (contests ? 0 : first);
    const uint32_t *offsets = multiply->step_offset + stream->order[0]; /* without contests, in order */
    uint32_t coming[AHEAD + 1];
    UNROLL for (int i = 0; i < AHEAD; i++) coming[i + 1] = multiply->step_offset[stream->order[i]];
    Vector sums[BLOCK][4];
    UNROLL for (int c = 0; c < channels; c++) UNROLL for (int v = 0; v < vectors; v++) sums[c][v] =
        load_sums(&multiply->acc[first + c][at + v * LANES]);
    for (int64_t i = 0; i < stream->steps; i++, word += words * side) {
        UNROLL for (int j = 0; j < AHEAD; j++) coming[j] = coming[j + 1];
        int64_t offset = contests ? coming[0] : offsets[i];
        if (contests) {
            coming[AHEAD] = multiply->step_offset[stream->order[i + AHEAD]];
            prefetch_contests(plane0 + coming[AHEAD], has_two ? plane1 + coming[AHEAD] : NULL,
                              flags + coming[AHEAD], vectors);
            if (at == 0) /* and, for the first positions only, for words of the next strip */
                prefetch_words(word + STRIP_WORDS, words * side);
        }
        Vector a0[4], a1[4];
        Flags raised[4];
        Choice crowded[4];
        UNROLL for (int v = 0; v < vectors; v++) {
            a0[v] = load_plane(plane0 + offset + v * LANES);
            if (has_two)
                a1[v] = load_plane(plane1 + offset + v * LANES);
            if (contests)
                raised[v] = load_flags(flags + offset + v * LANES);
            if (form == FORM_FULL)
                crowded[v] = three_of_four(raised[v]);
        }
        UNROLL for (int c = 0; c < channels; c++) {
            Vector w = broadcast(word + c), w4 = w, mask = w;
            Flags two, three;
            if (contests)
                w4 = broadcast(word + side + c);
            if (form == FORM_MIXED) {
                two = broadcast_flag(word + 2 * side + c);
                three = broadcast_flag(word + 3 * side + c);
            }
            if (form == FORM_MIXED && spares)
                mask = broadcast(word + (words - 1) * side + c);
            UNROLL for (int v = 0; v < vectors; v++) {
                Vector a = a0[v];
                if (selects) /* broadcast for every v: the mask's register may become the result's */
                    a = select_bytes(broadcast(word + (words - 1) * side + c), a1[v], a0[v]);
                if (form == FORM_MIXED) {
                    Choice reduces = is_raised(raised[v], two);
                    crowded[v] = is_raised(raised[v], three);
                    a = spares ? choose_masked(reduces, a, a1[v], mask) : choose(reduces, a, a1[v]);
                    a = spares ? choose(crowded[v], a, a1[v]) : a;
                }
                sums[c][v] = multiply_add(sums[c][v], a, contests ? choose(crowded[v], w, w4) : w);
            }
        }
    }
    UNROLL for (int c = 0; c < channels; c++) UNROLL for (int v = 0; v < vectors; v++)
        store_sums(&multiply->acc[first + c][at + v * LANES], sums[c][v]);
}

/* As many positions at a time as registers hold. A vector of which one lane is used costs more than that lane
 * by itself, where there is a way for few positions. */
INLINE void multiply_strip(const MultiplyArguments *multiply, const Stream *strip, int first, const Form form,
                           const bool spares) {
    const int most = form_channels(form) == TEAM ? TEAM_VECTORS : DENSE_VECTORS;
    int at = 0;
    for (int left = multiply->positions; left > 0; left = multiply->positions - at) {
#ifdef FEW
        if (left <= FEW) {
            if (left > 1)
                multiply_few(multiply, strip, first, at, FEW, form, spares);
            else
                multiply_few(multiply, strip, first, at, 1, form, spares);
            break;
        }
        int vectors = (left - 2) / LANES + 1; /* a single position on top is left over */
#else
        int vectors = (left - 1) / LANES + 1;
#endif
        vectors = vectors < most ? vectors : most;
        if (most >= 4 && vectors == 4)
            multiply_steps(multiply, strip, first, at, 4, form, spares);
        else if (most >= 3 && vectors == 3)
            multiply_steps(multiply, strip, first, at, 3, form, spares);
        else if (vectors == 2)
            multiply_steps(multiply, strip, first, at, 2, form, spares);
        else
            multiply_steps(multiply, strip, first, at, 1, form, spares);
        at += vectors * LANES;
    }
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

/* A stream without contests is for the whole block, of which so many channels fit the registers. */
INLINE void multiply_dense(const MultiplyArguments *multiply, const Form form) {
    for (int first = 0; first < BLOCK; first += DENSE_CHANNELS)
        multiply_stream(multiply, &multiply->streams[0][0], first, form, false);
}

INLINE void multiply_contests(const MultiplyArguments *multiply, const bool spares) {
    for (int team = 0; team < TEAMS; team++) {
        multiply_stream(multiply, &multiply->streams[team][FULL], team * TEAM, FORM_FULL, spares);
        multiply_stream(multiply, &multiply->streams[team][MIXED], team * TEAM, FORM_MIXED, spares);
    }
}

/* The entries of one channel, for `vectors` of positions. */
INLINE void add_entries(const MultiplyArguments *multiply, int channel, int at, const int vectors) {
    const int64_t *first = multiply->first_entry + channel * multiply->layer->chunks;
    const Entry *entry = multiply->layer->entries + first[0], *end = multiply->layer->entries + first[1];
    const uint32_t *planes = multiply->planes + at;
    __asm__("" : "+r"(planes)); /* as above */
    Vector sums[ENTRY_CHAINS][8];
    UNROLL for (int v = 0; v < vectors; v++) {
        sums[0][v] = load_sums(&multiply->acc[channel][at + v * LANES]);
        if (ENTRY_CHAINS == 2)
            sums[ENTRY_CHAINS - 1][v] = no_sums();
    }
    for (; entry < end; entry += ENTRY_CHAINS)
        UNROLL for (int chain = 0; chain < ENTRY_CHAINS; chain++) {
            if (chain == 1 && entry + 1 == end)
                break;
            const uint32_t *a = planes + (entry[chain].where >> STEP_BITS) * multiply->plane_stride +
                                multiply->step_offset[entry[chain].where & ((1u << STEP_BITS) - 1)];
            Vector w = broadcast(&entry[chain].word);
            UNROLL for (int v = 0; v < vectors; v++) sums[chain][v] =
                multiply_add(sums[chain][v], load_plane(a + v * LANES), w);
        }
    UNROLL for (int v = 0; v < vectors; v++) {
        Vector sum = ENTRY_CHAINS == 2 ? add_sums(sums[0][v], sums[ENTRY_CHAINS - 1][v]) : sums[0][v];
        store_sums(&multiply->acc[channel][at + v * LANES], sum);
    }
}

static void multiply_entries(const MultiplyArguments *multiply, int channel) {
    const int64_t *first = multiply->first_entry + channel * multiply->layer->chunks;
    if (first[0] == first[1])
        return;
    int vectors = (multiply->positions + LANES - 1) / LANES, at = 0;
    for (; vectors >= 8; vectors -= 8, at += 8 * LANES)
        add_entries(multiply, channel, at, 8);
    for (; vectors >= 4; vectors -= 4, at += 4 * LANES)
        add_entries(multiply, channel, at, 4);
    if (vectors == 3)
        add_entries(multiply, channel, at, 3);
    else if (vectors == 2)
        add_entries(multiply, channel, at, 2);
    else if (vectors == 1)
        add_entries(multiply, channel, at, 1);
}

static void multiply_block(const MultiplyArguments *multiply) {
    *multiply->ran_on = PATH_NAME;
    switch (multiply->layer->form) {
    case FORM_PLAIN:
        multiply_dense(multiply, FORM_PLAIN);
        break;
    case FORM_SELECT:
        multiply_dense(multiply, FORM_SELECT);
        break;
    case FORM_FULL:
    case FORM_MIXED:
        if (multiply->layer->rule.needs_both)
            multiply_contests(multiply, true);
        else
            multiply_contests(multiply, false);
        break;
    case FORM_NONE:
        break;
    }
    for (int c = 0; c < multiply->channels; c++)
        multiply_entries(multiply, c);
}
