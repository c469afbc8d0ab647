/* Buffers that outlive a layer's run. */
#ifndef SYSMT_BUFFERS_H
#define SYSMT_BUFFERS_H

#include <stddef.h>

/* 64-byte aligned, contents undefined; NULL when memory runs out. */
void *buffer_take(size_t bytes);

/* Give back what buffer_take returned (or NULL): kept for the next taker, up to a few. */
void buffer_give(void *buffer);

#endif
