// Reads slots from standard input, as records of 12 little-endian 32-bit words: four activation bytes, four
// weight bytes, ten expected sums. Works each off in every slot of slot_bench.v; prints the slots, and per kind
// the sums that differ. Exit status 1 if any does.
//
//      slot_bench [stop]     with `stop`, ends at the first difference

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "Vslot_bench.h"
#include "verilated.h"

namespace {
constexpr int kinds = 10;
constexpr int words = kinds + 2;
}  // namespace

int main(int argc, char** argv) {
    const bool stop = argc > 1 && std::strcmp(argv[1], "stop") == 0;
    VerilatedContext context;
    Vslot_bench top{&context};
    std::vector<uint32_t> records(words * 4096);
    uint64_t slots = 0;
    uint64_t wrong[kinds] = {};
    bool clean = true;
    for (;;) {
        const size_t count = std::fread(records.data(), 4 * words, 4096, stdin);
        if (count == 0) {
            break;
        }
        for (size_t i = 0; i < count && (clean || !stop); i++) {
            const uint32_t* record = &records[words * i];
            top.a = record[0];
            top.w = record[1];
            top.eval();
            slots++;
            for (int kind = 0; kind < kinds; kind++) {
                if (top.out[kind] != record[2 + kind]) {
                    if (wrong[kind]++ == 0) {
                        std::fprintf(stderr, "kind %d: a=%08x w=%08x gives %d, not %d\n", kind, record[0], record[1],
                                     static_cast<int32_t>(top.out[kind]), static_cast<int32_t>(record[2 + kind]));
                    }
                    clean = false;
                }
            }
        }
    }
    std::printf("%llu", static_cast<unsigned long long>(slots));
    for (const uint64_t count : wrong) {
        std::printf(" %llu", static_cast<unsigned long long>(count));
    }
    std::printf("\n");
    top.final();
    return clean ? 0 : 1;
}
