/* The C side of the fast engine: what a layer is, what a path must offer.
 *
 * Everything is one convolution: a GEMM (M, K) x (K, N) is a 1 x 1 convolution of K channels over an
 * image of one row of M pixels. csrc/README.md draws the data layouts.
 */
#ifndef SYSMT_KERNELS_H
#define SYSMT_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_THREADS = 4 };

/* What the shared multiplier does in a slot: ArrayConfig, seen from one PE. */
typedef struct {
    int threads;         /* T: 1, 2 or 4 */
    bool skips_zeros;    /* S: pairs with a zero operand leave the multiplier to the others */
    bool reduces_always; /* S alone: narrow operands are reduced too */
    bool reduces_weight; /* W: a 2-way collision reduces the weight, not the activation */
    bool needs_both;     /* Aw, aW: ... and only where both operands are wide */
    bool saturate;       /* hold 240 / +112 instead of 256 / +128 */
    bool truncate;       /* floor instead of half to even */
    bool is_signed;      /* int8 activations */
} SlotRule;

/* One convolution; n and c are output and input channels of one group. */
typedef struct {
    int64_t groups, n, c, kh, kw;
    int64_t conv_stride_h, conv_stride_w;
    int64_t pad_top, pad_bottom, pad_left, pad_right;
    int64_t dilation_h, dilation_w;
} ConvShape;

/* Activations: float32 to be quantised, or 8-bit integers. Strides are in elements, any sign. */
typedef struct {
    const void *data;
    bool is_float;
    int64_t batch, height, width;
    int64_t stride_b, stride_c, stride_h, stride_w;
    float inverse_scale; /* float32(1 / scale); unused for integers */
} Source;

/* Outputs: float32 (dequantised) or int32 accumulators. Strides are in elements, any sign. */
typedef struct {
    void *data;
    bool is_float;
    int64_t stride_b, stride_n, stride_h, stride_w;
    const float *scale;        /* (groups * n): scale_a * scale_w; unused for integers */
    const float *bias;         /* (groups * n) or NULL */
    const float *gain, *shift; /* (groups * n) or NULL: then y = y * gain + shift, rounded once */
    bool relu;                 /* last */
} Sink;

/* What the vector paths' time is spent on. */
enum { TIME_STAGE, TIME_COUNT, TIME_PACK, TIME_MULTIPLY, TIME_STORE, TIMES };

/* Counters summed over all outputs and slots, and what was seen on the way in. */
typedef struct {
    int64_t active[MAX_THREADS + 1];
    int64_t reduced_activations, reduced_weights;
    bool saw_nonfinite, saw_negative;
    bool is_timed;              /* set by the caller: fill in what follows */
    int64_t nanoseconds[TIMES]; /* CPU time of whole jobs; zeros on the scalar path */
    const char *ran_on;         /* set by the code that multiplies: which path it is of; NULL if none did */
} Outcome;

typedef struct Layer Layer; /* a layer's packed weights; the scalar path has its own */

typedef struct VectorOps VectorOps; /* what a vector path brings: engine.h */

/* One instruction set's way to run a layer. All functions return NULL or false when memory runs out. */
typedef struct {
    const char *name;
    bool (*is_supported)(void);
    const VectorOps *ops; /* for pack; NULL on the scalar path, and where the compiler cannot build it */
    /* weights: (groups * n, c, kh, kw) C-order. k_of: (groups, T * ceil(K / T)): which k stands at a
     * position of the reordered, padded K axis, -1 for padding. Both are copied. */
    Layer *(*pack)(const VectorOps *ops, const ConvShape *shape, const SlotRule *rule, const int8_t *weights,
                   const int32_t *k_of);
    /* Run the layer; outcome is added to, `count` says whether its counters are. */
    bool (*run)(const Layer *layer, const Source *source, const Sink *sink, int cpu_threads, bool count,
                Outcome *outcome);
    size_t (*weight_bytes)(const Layer *layer);
    void (*release)(Layer *layer);
} Path;

extern const Path path_scalar;
extern const Path path_avx2;
extern const Path path_avx512vnni;

/* The paths that this CPU, operating system and build offer, best first; returns how many. */
enum { MAX_PATHS = 3 };
int list_paths(const Path *paths[MAX_PATHS]);
bool path_not_built(void); /* false */

/* Run task(context, i) for i = 0..tasks-1 on up to cpu_threads threads; returns when all are done. */
void parallel_for(int64_t tasks, int cpu_threads, void (*task)(void *context, int64_t index), void *context);

static inline int64_t output_size(int64_t in, int64_t pad, int64_t kernel, int64_t stride, int64_t dilation) {
    int64_t span = in + pad - dilation * (kernel - 1) - 1;
    return span < 0 ? 0 : span / stride + 1;
}

static inline int64_t output_height(const ConvShape *shape, const Source *source) {
    return output_size(source->height, shape->pad_top + shape->pad_bottom, shape->kh, shape->conv_stride_h,
                       shape->dilation_h);
}

static inline int64_t output_width(const ConvShape *shape, const Source *source) {
    return output_size(source->width, shape->pad_left + shape->pad_right, shape->kw, shape->conv_stride_w,
                       shape->dilation_w);
}

static inline int64_t slot_count(const ConvShape *shape, const SlotRule *rule) {
    int64_t k = shape->c * shape->kh * shape->kw;
    return (k + rule->threads - 1) / rule->threads;
}

#endif
