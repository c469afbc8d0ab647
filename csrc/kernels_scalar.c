/* The plain path: the slot rule evaluated pair by pair, on an im2col row at a time.
 *
 * It shares no planes, tables or histograms with the vector paths, so that they can be held against it.
 */
#include "kernels.h"
#include "slot.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* An operand as the multiplier may see it. */
typedef struct {
    int16_t exact, reduced; /* 8 bits; 4 high bits, rounded */
    bool is_active;         /* non-zero */
    bool is_reducible;      /* wide, or any under policy S */
} Operand;

struct Layer {
    ConvShape shape;
    SlotRule rule;
    int64_t slots;    /* L */
    int32_t *k_of;    /* (groups, T * L) */
    Operand *weights; /* (groups, n, L, T) */
};

static Operand operand(int value, bool is_signed, const SlotRule *rule) {
    return (Operand){.exact = (int16_t)value,
                     .reduced = (int16_t)reduce_value(value, is_signed, rule),
                     .is_active = value != 0,
                     .is_reducible = is_reducible(value, is_signed, rule)};
}

static bool is_supported(void) {
    return true;
}

static void release_layer(Layer *layer) {
    if (layer) {
        free(layer->k_of);
        free(layer->weights);
        free(layer);
    }
}

static size_t weight_bytes(const Layer *layer) {
    const ConvShape *shape = &layer->shape;
    size_t positions = (size_t)(shape->groups * layer->slots * layer->rule.threads);
    return positions * (sizeof(int32_t) + (size_t)shape->n * sizeof(Operand));
}

static Layer *pack_layer(const VectorOps *ops, const ConvShape *shape, const SlotRule *rule,
                         const int8_t *weights, const int32_t *k_of) {
    (void)ops;
    int64_t slots = slot_count(shape, rule), threads = rule->threads, k = shape->c * shape->kh * shape->kw;
    size_t positions = (size_t)(shape->groups * slots * threads);
    Layer *layer = calloc(1, sizeof *layer);
    if (!layer)
        return NULL;
    *layer = (Layer){.shape = *shape, .rule = *rule, .slots = slots};
    layer->k_of = malloc(positions * sizeof *layer->k_of + 1);
    layer->weights = malloc(positions * (size_t)shape->n * sizeof *layer->weights + 1);
    if (!layer->k_of || !layer->weights) {
        release_layer(layer);
        return NULL;
    }
    memcpy(layer->k_of, k_of, positions * sizeof *k_of);
    Operand *out = layer->weights;
    for (int64_t group = 0; group < shape->groups; group++)
        for (int64_t n = 0; n < shape->n; n++)
            for (int64_t slot = 0; slot < slots; slot++)
                for (int64_t t = 0; t < threads; t++) {
                    int32_t from = k_of[(group * threads + t) * slots + slot];
                    int value = from < 0 ? 0 : weights[(group * shape->n + n) * k + from];
                    *out++ = operand(value, true, rule);
                }
    return layer;
}

/* Work off one slot of T pairs; returns its value and adds to the counters. */
static inline int work_slot(const Operand *a, const Operand *w, int threads, const SlotRule *rule,
                            Outcome *outcome) {
    bool pair[MAX_THREADS];
    int active = 0, value = 0;
    for (int t = 0; t < threads; t++)
        active += pair[t] = a[t].is_active & w[t].is_active;
    outcome->active[active]++;
    int contenders = rule->skips_zeros ? active : threads;
    for (int t = 0; t < threads; t++) {
        if (!pair[t])
            continue;
        bool reduce_a = false, reduce_w = false;
        if (contenders >= 3) {
            reduce_a = a[t].is_reducible;
            reduce_w = w[t].is_reducible;
        } else if (contenders == 2) {
            bool is_spared = rule->needs_both && !(a[t].is_reducible && w[t].is_reducible);
            reduce_a = !rule->reduces_weight && a[t].is_reducible && !is_spared;
            reduce_w = rule->reduces_weight && w[t].is_reducible && !is_spared;
        }
        value += (reduce_a ? a[t].reduced : a[t].exact) * (reduce_w ? w[t].reduced : w[t].exact);
        outcome->reduced_activations += reduce_a;
        outcome->reduced_weights += reduce_w;
    }
    return value;
}

/* One output: L slots of one row of operands against one column. */
static int32_t work_output(const Operand *a, const Operand *w, int64_t slots, const SlotRule *rule,
                           Outcome *outcome) {
    int32_t sum = 0;
    for (int64_t slot = 0; slot < slots; slot++) {
        if (rule->threads == 4)
            sum += work_slot(a + slot * 4, w + slot * 4, 4, rule, outcome);
        else if (rule->threads == 2)
            sum += work_slot(a + slot * 2, w + slot * 2, 2, rule, outcome);
        else
            sum += work_slot(a + slot, w + slot, 1, rule, outcome);
    }
    return sum;
}

/* Fetch one activation as an integer: quantised by the float32 rule of docs/semantics.md, or as it stands. */
static int fetch(const Source *source, int64_t index, bool is_signed, Outcome *outcome) {
    if (!source->is_float)
        return is_signed ? ((const int8_t *)source->data)[index] : ((const uint8_t *)source->data)[index];
    float x = ((const float *)source->data)[index];
    if (!isfinite(x)) {
        outcome->saw_nonfinite = true;
        return 0;
    }
    outcome->saw_negative |= x < 0;
    float low = is_signed ? -127.0f : 0.0f, high = is_signed ? 127.0f : 255.0f;
    float scaled = x * source->inverse_scale;
    return (int)rintf(scaled < low ? low : scaled > high ? high : scaled);
}

/* One row of the im2col matrix: the operands of output pixel (y, x), in slot order. */
static void gather_row(const Layer *layer, const Source *source, int64_t image, int64_t group, int64_t y,
                       int64_t x, Operand *row, Outcome *outcome) {
    const ConvShape *shape = &layer->shape;
    int64_t threads = layer->rule.threads, slots = layer->slots;
    const int32_t *k_of = layer->k_of + group * threads * slots;
    bool is_signed = layer->rule.is_signed;
    for (int64_t slot = 0; slot < slots; slot++)
        for (int64_t t = 0; t < threads; t++) {
            int64_t k = k_of[t * slots + slot];
            int value = 0;
            if (k >= 0) {
                int64_t channel = group * shape->c + k / (shape->kh * shape->kw);
                int64_t iy =
                    y * shape->conv_stride_h - shape->pad_top + k / shape->kw % shape->kh * shape->dilation_h;
                int64_t ix = x * shape->conv_stride_w - shape->pad_left + k % shape->kw * shape->dilation_w;
                if (iy >= 0 && iy < source->height && ix >= 0 && ix < source->width)
                    value = fetch(source,
                                  image * source->stride_b + channel * source->stride_c +
                                      iy * source->stride_h + ix * source->stride_w,
                                  is_signed, outcome);
            }
            row[slot * threads + t] = operand(value, is_signed, &layer->rule);
        }
}

static void store(const Sink *sink, int64_t index, int64_t channel, int32_t sum) {
    if (!sink->is_float) {
        ((int32_t *)sink->data)[index] = sum;
        return;
    }
    float y = (float)sum * sink->scale[channel];
    if (sink->bias)
        y += sink->bias[channel];
    if (sink->gain)
        y = fmaf(y, sink->gain[channel], sink->shift[channel]);
    ((float *)sink->data)[index] = sink->relu && y < 0 ? 0 : y;
}

typedef struct {
    const Layer *layer;
    const Source *source;
    const Sink *sink;
    int64_t height, width; /* of the output */
    Outcome *outcome;      /* shared, under the lock */
    bool is_out_of_memory;
    pthread_mutex_t lock;
} Work;

static void add_outcome(Outcome *to, const Outcome *from) {
    for (int c = 0; c <= MAX_THREADS; c++)
        to->active[c] += from->active[c];
    to->reduced_activations += from->reduced_activations;
    to->reduced_weights += from->reduced_weights;
    to->saw_nonfinite |= from->saw_nonfinite;
    to->saw_negative |= from->saw_negative;
    to->ran_on = from->ran_on;
}

/* Task `index`: some output pixels of one image and group. */
enum { PIXELS = 64 };

static void run_share(void *context, int64_t index) {
    Work *work = context;
    const Layer *layer = work->layer;
    const ConvShape *shape = &layer->shape;
    int64_t pixels = work->height * work->width, shares = (pixels + PIXELS - 1) / PIXELS;
    int64_t first = index % shares * PIXELS, group = index / shares % shape->groups,
            image = index / shares / shape->groups;
    int64_t length = layer->slots * layer->rule.threads;
    Outcome outcome = {.ran_on = path_scalar.name};
    Operand *row = malloc((size_t)length * sizeof *row + 1);
    for (int64_t p = first; row && p < pixels && p < first + PIXELS; p++) {
        int64_t y = p / work->width, x = p % work->width;
        gather_row(layer, work->source, image, group, y, x, row, &outcome);
        for (int64_t n = group * shape->n; n < (group + 1) * shape->n; n++)
            store(work->sink,
                  image * work->sink->stride_b + n * work->sink->stride_n + y * work->sink->stride_h +
                      x * work->sink->stride_w,
                  n, work_output(row, layer->weights + n * length, layer->slots, &layer->rule, &outcome));
    }
    pthread_mutex_lock(&work->lock);
    work->is_out_of_memory |= !row;
    add_outcome(work->outcome, &outcome);
    pthread_mutex_unlock(&work->lock);
    free(row);
}

static bool run_layer(const Layer *layer, const Source *source, const Sink *sink, int cpu_threads, bool count,
                      Outcome *outcome) {
    Outcome counted = {0};
    Work context = {.layer = layer,
                    .source = source,
                    .sink = sink,
                    .height = output_height(&layer->shape, source),
                    .width = output_width(&layer->shape, source),
                    .outcome = &counted,
                    .lock = PTHREAD_MUTEX_INITIALIZER};
    int64_t shares = (context.height * context.width + PIXELS - 1) / PIXELS;
    parallel_for(source->batch * layer->shape.groups * shares, cpu_threads, run_share, &context);
    if (!count) {
        memset(counted.active, 0, sizeof counted.active);
        counted.reduced_activations = counted.reduced_weights = 0;
    }
    add_outcome(outcome, &counted);
    return !context.is_out_of_memory;
}

const Path path_scalar = {"scalar", is_supported, NULL, pack_layer, run_layer, weight_bytes, release_layer};
