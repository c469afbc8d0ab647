/* A 64-bit fingerprint of a block of memory, at about the speed of reading it.
 *
 * Tells whether weights still hold what they held: every forward looks at every byte. Position matters, so
 * swapped values change it, too.
 */
#ifndef SYSMT_FINGERPRINT_H
#define SYSMT_FINGERPRINT_H

#include <stdint.h>

/* Does not depend on cpu_threads. */
uint64_t fingerprint(const unsigned char *data, int64_t bytes, int cpu_threads);

#endif
