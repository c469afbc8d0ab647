# cython: language_level=3, boundscheck=False, wraparound=False
"""The binding to the C kernels of csrc/: pointers, strides and the GIL, nothing else.

`sysmt.hw.kernels` checks everything before it calls here.
"""

from libc.stdint cimport int8_t, int32_t, int64_t
from libc.string cimport memset

cimport numpy as cnp

cnp.import_array()

cdef extern from "fingerprint.h" nogil:
    unsigned long long fingerprint_bytes "fingerprint"(const unsigned char *data, int64_t bytes, int cpu_threads)

cdef extern from "buffers.h" nogil:
    void buffers_keep_heap()

cdef extern from "kernels.h" nogil:
    cdef enum:
        MAX_PATHS
        TIMES

    ctypedef struct SlotRule:
        int threads
        bint skips_zeros
        bint reduces_always
        bint reduces_weight
        bint needs_both
        bint saturate
        bint truncate
        bint is_signed

    ctypedef struct ConvShape:
        int64_t groups, n, c, kh, kw
        int64_t conv_stride_h, conv_stride_w
        int64_t pad_top, pad_bottom, pad_left, pad_right
        int64_t dilation_h, dilation_w

    ctypedef struct Source:
        const void *data
        bint is_float
        int64_t batch, height, width
        int64_t stride_b, stride_c, stride_h, stride_w
        float inverse_scale

    ctypedef struct Sink:
        void *data
        bint is_float
        int64_t stride_b, stride_n, stride_h, stride_w
        const float *scale
        const float *bias
        const float *gain
        const float *shift
        bint relu

    ctypedef struct Outcome:
        int64_t active[5]
        int64_t reduced_activations, reduced_weights
        bint saw_nonfinite, saw_negative, is_timed
        int64_t nanoseconds[TIMES]
        const char *ran_on

    ctypedef struct VectorOps:
        pass

    ctypedef struct CLayer "Layer":
        pass

    ctypedef struct Path:
        const char *name
        const VectorOps *ops
        CLayer *(*pack)(const VectorOps *, const ConvShape *, const SlotRule *, const int8_t *, const int32_t *) noexcept nogil
        bint (*run)(const CLayer *, const Source *, const Sink *, int, bint, Outcome *) noexcept nogil
        size_t (*weight_bytes)(const CLayer *) noexcept nogil
        void (*release)(CLayer *) noexcept nogil

    int list_paths(const Path **) noexcept


cdef const Path *find_path(str name) except NULL:
    cdef const Path *paths[MAX_PATHS]
    for i in range(list_paths(paths)):
        if paths[i].name.decode() == name:
            return paths[i]
    raise LookupError(name)


def fingerprint(values, int cpu_threads):
    """64-bit fingerprint of an array's memory; the array must be C-contiguous."""
    cdef const unsigned char[::1] data = values.reshape(-1).view("u1")
    cdef int64_t size = data.shape[0]
    cdef unsigned long long result
    with nogil:
        result = fingerprint_bytes(&data[0] if size else NULL, size, cpu_threads)
    return result


def keep_heap():
    """Let the C library keep freed memory for the next forward, unless the user has tuned it."""
    buffers_keep_heap()


def path_names():
    """Return the names of the paths that run here, best first."""
    cdef const Path *paths[MAX_PATHS]
    return tuple(paths[i].name.decode() for i in range(list_paths(paths)))


cdef class Layer:
    """The packed weights of one layer on one path."""

    cdef const Path *path
    cdef CLayer *layer
    cdef ConvShape shape
    cdef SlotRule rule
    cdef public bint is_timed
    cdef readonly tuple nanoseconds
    cdef readonly str ran_on

    def __cinit__(self, str path, tuple shape, dict rule, cnp.ndarray weights, cnp.ndarray k_of):
        cdef ConvShape *s = &self.shape
        self.path = find_path(path)
        (
            s.groups, s.n, s.c, s.kh, s.kw, s.conv_stride_h, s.conv_stride_w,
            s.pad_top, s.pad_bottom, s.pad_left, s.pad_right, s.dilation_h, s.dilation_w,
        ) = shape
        self.rule = rule  # Cython converts a dict with just these keys
        cdef const int8_t *weight_data = <const int8_t *>cnp.PyArray_DATA(weights)
        cdef const int32_t *k_data = <const int32_t *>cnp.PyArray_DATA(k_of)
        with nogil:
            self.layer = self.path.pack(self.path.ops, &self.shape, &self.rule, weight_data, k_data)
        if self.layer == NULL:
            raise MemoryError("no memory for a layer's packed weights")

    def __dealloc__(self):
        if self.layer != NULL:
            self.path.release(self.layer)

    @property
    def weight_bytes(self):
        """Bytes that the packed weights take."""
        return self.path.weight_bytes(self.layer)

    def run(
        self, cnp.ndarray x, cnp.ndarray out, *, float inverse_scale=1.0,
        cnp.ndarray scale=None, cnp.ndarray bias=None, cnp.ndarray gain=None, cnp.ndarray shift=None,
        bint relu=False, int cpu_threads=1, bint count=True,
    ):
        """Run x (B, C, H, W) into out (B, N, OH, OW); return counters and flags."""
        cdef Source source
        cdef Sink sink
        cdef Outcome outcome
        cdef bint done
        source.data = cnp.PyArray_DATA(x)
        source.is_float = x.dtype.kind == "f"
        source.batch, source.height, source.width = x.shape[0], x.shape[2], x.shape[3]
        source.stride_b, source.stride_c, source.stride_h, source.stride_w = [
            stride // x.itemsize for stride in (<object>x).strides
        ]
        source.inverse_scale = inverse_scale
        sink.data = cnp.PyArray_DATA(out)
        sink.is_float = out.dtype.kind == "f"
        sink.stride_b, sink.stride_n, sink.stride_h, sink.stride_w = [
            stride // out.itemsize for stride in (<object>out).strides
        ]
        sink.scale = sink.bias = sink.gain = sink.shift = NULL
        if scale is not None:
            sink.scale = <const float *>cnp.PyArray_DATA(scale)
        if bias is not None:
            sink.bias = <const float *>cnp.PyArray_DATA(bias)
        if gain is not None:
            sink.gain = <const float *>cnp.PyArray_DATA(gain)
            sink.shift = <const float *>cnp.PyArray_DATA(shift)
        sink.relu = relu
        memset(&outcome, 0, sizeof(outcome))
        outcome.is_timed = self.is_timed
        with nogil:
            done = self.path.run(self.layer, &source, &sink, cpu_threads, count, &outcome)
        if not done:
            raise MemoryError("no memory for a layer's packed activations")
        self.nanoseconds = tuple(outcome.nanoseconds[i] for i in range(TIMES))
        self.ran_on = None if outcome.ran_on == NULL else outcome.ran_on.decode()
        return (
            tuple(outcome.active[c] for c in range(self.rule.threads + 1)),
            outcome.reduced_activations,
            outcome.reduced_weights,
            bool(outcome.saw_nonfinite),
            bool(outcome.saw_negative),
        )
