/* What was seen among the activations that a layer reads. */
#ifndef SYSMT_SEEN_H
#define SYSMT_SEEN_H

#include "kernels.h"

typedef struct {
    bool nonfinite, negative;
} Seen;

/* Keep of `seen` what holds for pixels that some window reads: staging looks at others, too, where a layer
 * strides over them. False when memory runs out. */
bool seen_settle(const ConvShape *shape, const Source *source, Seen *seen);

#endif
