/* Fresh pages from the kernel, zeroed and faulted in one by one, cost a tenth of a network's forward. So a
 * few buffers are kept from run to run: KEPT of at most LARGEST_KEPT bytes for the whole process. Once the C
 * library's heap keeps what is freed, they go back to it instead: a layer's scratch is then no faster to come
 * by from here, and while other layers run, the memory is theirs. */
#include "buffers.h"
#include "tuning.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

enum { KEPT = KEPT_BUFFERS, ALIGNMENT = 64 };

/* In front of every buffer. */
typedef struct {
    _Alignas(ALIGNMENT) size_t bytes;
} Header;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Header *kept[KEPT];
static bool heap_keeps; /* so nothing is kept here */

static void lock_buffers(void) {
    pthread_mutex_lock(&lock);
}

static void unlock_buffers(void) {
    pthread_mutex_unlock(&lock);
}

/* A fork waits until no other thread is at the buffers, so that the child, which has no other thread, finds
 * them whole and unlocked. */
__attribute__((constructor)) static void survive_forks(void) {
    pthread_atfork(lock_buffers, unlock_buffers, unlock_buffers);
}

/* The smallest kept buffer that is large enough, but not wastefully so. */
static Header *find_kept(size_t bytes) {
    int best = -1;
    for (int i = 0; i < KEPT; i++)
        if (kept[i] && kept[i]->bytes >= bytes && kept[i]->bytes <= 4 * bytes + 4096 &&
            (best < 0 || kept[i]->bytes < kept[best]->bytes))
            best = i;
    if (best < 0)
        return NULL;
    Header *header = kept[best];
    kept[best] = NULL;
    return header;
}

void *buffer_take(size_t bytes) {
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    pthread_mutex_lock(&lock);
    Header *header = find_kept(bytes);
    pthread_mutex_unlock(&lock);
    if (!header) {
        header = aligned_alloc(ALIGNMENT, bytes + sizeof *header);
        if (!header)
            return NULL;
        header->bytes = bytes;
    }
    return header + 1;
}

void buffer_give(void *buffer) {
    if (!buffer)
        return;
    Header *header = (Header *)buffer - 1;
    pthread_mutex_lock(&lock);
    if (!heap_keeps && header->bytes <= LARGEST_KEPT) {
        int at = 0; /* a free place, else the smallest buffer's */
        for (int i = 0; i < KEPT && kept[at]; i++)
            if (!kept[i] || kept[i]->bytes < kept[at]->bytes)
                at = i;
        Header *out = kept[at];
        kept[at] = header;
        header = out;
    }
    pthread_mutex_unlock(&lock);
    free(header);
}

/* A layer's outputs are a few megabytes each. By default they are mapped afresh, or trimmed off the heap,
 * again and again. */
void buffers_keep_heap(void) {
#ifdef __GLIBC__
    const char *tunables = getenv("GLIBC_TUNABLES");
    bool is_tuned = getenv("MALLOC_TRIM_THRESHOLD_") || getenv("MALLOC_MMAP_THRESHOLD_") ||
                    (tunables && strstr(tunables, "glibc.malloc"));
    if (!is_tuned) {
        mallopt(M_TRIM_THRESHOLD, HEAP_TRIM_BYTES);
        mallopt(M_MMAP_THRESHOLD, HEAP_MAP_BYTES);
    }
    pthread_mutex_lock(&lock);
    heap_keeps = true; /* where it is tuned, too: then the user has said what is to be kept */
    for (int i = 0; i < KEPT; i++) {
        free(kept[i]);
        kept[i] = NULL;
    }
    pthread_mutex_unlock(&lock);
#endif
}
