#include "seen.h"

#include <math.h>
#include <stdlib.h>

/* Mark the rows (or columns) of the input that some output reads; return whether all are. */
static bool mark_read(bool *is_read, int64_t in, int64_t out, int64_t pad, int64_t kernel, int64_t stride,
                      int64_t dilation) {
    for (int64_t o = 0; o < out; o++)
        for (int64_t k = 0; k < kernel; k++) {
            int64_t at = o * stride - pad + k * dilation;
            if (at >= 0 && at < in)
                is_read[at] = true;
        }
    bool are_all = true;
    for (int64_t i = 0; i < in; i++)
        are_all &= is_read[i];
    return are_all;
}

/* Look at the pixels in the rows and columns that are read, until there is nothing left to find. */
static Seen look(const Source *source, int64_t channels, const bool *rows, const bool *columns, Seen wanted) {
    Seen found = {false, false};
    for (int64_t image = 0; image < source->batch; image++)
        for (int64_t y = 0; y < source->height; y++)
            for (int64_t x = 0; rows[y] && x < source->width; x++)
                for (int64_t c = 0; columns[x] && c < channels; c++) {
                    float value =
                        ((const float *)source->data)[image * source->stride_b + c * source->stride_c +
                                                      y * source->stride_h + x * source->stride_w];
                    found.nonfinite |= !isfinite(value);
                    found.negative |= isfinite(value) && value < 0;
                    if (found.nonfinite == wanted.nonfinite && found.negative == wanted.negative)
                        return found;
                }
    return found;
}

bool seen_settle(const ConvShape *shape, const Source *source, Seen *seen) {
    if (!source->is_float || (!seen->nonfinite && !seen->negative))
        return true;
    bool *rows = calloc((size_t)(source->height + source->width), sizeof *rows);
    if (!rows)
        return false;
    bool *columns = rows + source->height;
    bool reads_all = mark_read(rows, source->height, output_height(shape, source), shape->pad_top, shape->kh,
                               shape->conv_stride_h, shape->dilation_h);
    reads_all &= mark_read(columns, source->width, output_width(shape, source), shape->pad_left, shape->kw,
                           shape->conv_stride_w, shape->dilation_w);
    /* An infinity below 0 counts as not finite alone. */
    if (!reads_all || seen->nonfinite)
        *seen = look(source, shape->groups * shape->c, rows, columns, *seen);
    free(rows);
    return true;
}
