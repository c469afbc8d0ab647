/* Buffers that outlive a layer's run. */
#ifndef SYSMT_BUFFERS_H
#define SYSMT_BUFFERS_H

#include <stddef.h>

/* 64-byte aligned, contents undefined; NULL when memory runs out. */
void *buffer_take(size_t bytes);

/* Give back what buffer_take returned (or NULL): kept for the next taker, up to a few, unless the heap is
 * left to do that (below). */
void buffer_give(void *buffer);

/* Let the C library keep what a forward frees instead of handing it back to the kernel, where it is the GNU
 * one and the user has not tuned it. Whole process, for good; about as much as was in use at once. From
 * then on no buffers are kept beside the heap. */
void buffers_keep_heap(void);

#endif
