/* parallel_for: borrow the process's OpenMP threads where there are any, else start our own.
 *
 * PyTorch's OpenMP workers keep spinning for a while after each of its operations. A second pool beside them
 * would fight for the same cores, so when a GNU or LLVM OpenMP runtime is already loaded, its own
 * GOMP_parallel runs our tasks. Nothing is linked: the symbol is looked up at run time, where the system can
 * list what is loaded (glibc, musl, the BSDs; elsewhere the threads are our own).
 *
 * A forked child has the runtime's memory but none of its workers: GNU's would wait for them for ever. So a
 * child never borrows; it starts its own threads.
 */
#define _GNU_SOURCE
#include "kernels.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct {
    int64_t tasks;
    atomic_int_fast64_t next;
    void (*task)(void *, int64_t);
    void *context;
} Work;

/* One thread's share: take tasks until none is left. */
static void drain(void *data) {
    Work *work = data;
    for (int64_t i; (i = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed)) < work->tasks;)
        work->task(work->context, i);
}

static void *drain_in_pthread(void *data) {
    drain(data);
    return NULL;
}

typedef void (*GompParallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

#if __has_include(<link.h>)

#include <dlfcn.h>
#include <link.h>
#include <string.h>

static bool is_forked; /* this process began as a fork of one that may have run OpenMP */

static void note_fork(void) {
    is_forked = true;
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, note_fork);
}

/* Whether a loaded object is an OpenMP runtime; remembers its GOMP_parallel. */
static int find_openmp(struct dl_phdr_info *info, size_t size, void *found) {
    (void)size;
    const char *slash = strrchr(info->dlpi_name, '/');
    const char *file = slash ? slash + 1 : info->dlpi_name;
    if (strncmp(file, "libgomp", 7) && strncmp(file, "libiomp5", 8) && strncmp(file, "libomp", 6))
        return 0;
    void *library = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
    void *symbol = library ? dlsym(library, "GOMP_parallel") : NULL;
    *(void **)found = symbol;
    return symbol != NULL;
}

static GompParallel openmp_of_this_process(void) {
    static _Atomic(void *) known; /* once found, a runtime stays loaded: dlopen above holds it */
    if (is_forked)
        return NULL;
    void *symbol = atomic_load_explicit(&known, memory_order_acquire);
    if (!symbol) {
        dl_iterate_phdr(find_openmp, &symbol);
        atomic_store_explicit(&known, symbol, memory_order_release);
    }
    GompParallel parallel;
    memcpy(&parallel, &symbol, sizeof parallel); /* ISO C has no cast from object to function pointer */
    return parallel;
}

#else

static GompParallel openmp_of_this_process(void) {
    return NULL;
}

#endif

static void run_on_pthreads(Work *work, int threads) {
    enum { MAX_OWN = 255 };
    pthread_t own[MAX_OWN];
    int started = 0;
    while (started < threads - 1 && started < MAX_OWN &&
           pthread_create(&own[started], NULL, drain_in_pthread, work) == 0)
        started++;
    drain(work);
    for (int i = 0; i < started; i++)
        pthread_join(own[i], NULL);
}

void parallel_for(int64_t tasks, int cpu_threads, void (*task)(void *context, int64_t index), void *context) {
    Work work = {.tasks = tasks, .task = task, .context = context};
    atomic_init(&work.next, 0);
    int threads = tasks < cpu_threads ? (int)tasks : cpu_threads;
    if (threads <= 1) {
        drain(&work);
        return;
    }
    GompParallel parallel = openmp_of_this_process();
    if (parallel)
        parallel(drain, &work, (unsigned)threads, 0);
    else
        run_on_pthreads(&work, threads);
}
