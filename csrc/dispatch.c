/* Which paths there are, best first. A path that the compiler could not build says it is unsupported. */
#include "kernels.h"

bool path_not_built(void) {
    return false;
}

int list_paths(const Path *paths[MAX_PATHS]) {
    static const Path *const best_first[] = {&path_avx512vnni, &path_avx2, &path_scalar};
    int count = 0;
    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++)
        if (best_first[i]->is_supported())
            paths[count++] = best_first[i];
    return count;
}
