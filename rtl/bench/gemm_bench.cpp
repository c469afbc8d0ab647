// Plays the memories around systolic_array.v: reads GEMMs from standard input, feeds them tile by tile, compares
// every accumulator that leaves the array, and counts clock cycles from the first one in which a PE works to the
// one in which the last accumulator leaves.
//
// All words are little-endian and 32 bits wide. A GEMM is: slots, tiles, then for each tile the operands of each
// slot (rows * threads activation bytes, cols * threads weight bytes) and rows * cols expected sums, row by row.
// Prints a line per GEMM: cycles, accumulators that left, and how many of them were wrong.
// Compiled with ROWS, COLS and THREADS as the model was.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <type_traits>
#include <vector>

#include "Vsystolic_array.h"
#include "verilated.h"

namespace {

constexpr int a_bytes = ROWS * THREADS;
constexpr int w_bytes = COLS * THREADS;

// A port is an integer up to 64 bits, and an array of 32-bit words beyond.
template <typename Port>
void put(Port& port, const uint8_t* bytes, int count) {
    if constexpr (std::is_integral_v<Port>) {
        uint64_t value = 0;
        for (int i = 0; i < count; i++) {
            value |= static_cast<uint64_t>(bytes[i]) << (8 * i);
        }
        port = static_cast<Port>(value);
    } else {
        for (int i = 0; i < count; i += 4) {
            uint32_t word = 0;
            for (int j = i; j < count && j < i + 4; j++) {
                word |= static_cast<uint32_t>(bytes[j]) << (8 * (j - i));
            }
            port[i / 4] = word;
        }
    }
}

template <typename Port>
uint32_t get(const Port& port, int word) {
    if constexpr (std::is_integral_v<Port>) {
        return static_cast<uint32_t>(static_cast<uint64_t>(port) >> (32 * word));
    } else {
        return port[word];
    }
}

struct Gemm {
    uint32_t slots = 0;
    uint32_t tiles = 0;
    std::vector<uint8_t> operands;   // tiles x slots x (a_bytes + w_bytes)
    std::vector<uint32_t> expected;  // tiles x ROWS x COLS
};

bool read_gemm(Gemm& gemm) {
    uint32_t head[2];
    if (std::fread(head, 4, 2, stdin) != 2) {
        return false;
    }
    gemm.slots = head[0];
    gemm.tiles = head[1];
    const size_t per_tile = static_cast<size_t>(gemm.slots) * (a_bytes + w_bytes);
    gemm.operands.resize(gemm.tiles * per_tile);
    gemm.expected.resize(static_cast<size_t>(gemm.tiles) * ROWS * COLS);
    for (uint32_t tile = 0; tile < gemm.tiles; tile++) {
        if (std::fread(&gemm.operands[tile * per_tile], 1, per_tile, stdin) != per_tile ||
            std::fread(&gemm.expected[static_cast<size_t>(tile) * ROWS * COLS], 4, ROWS * COLS, stdin) !=
                ROWS * COLS) {
            std::fprintf(stderr, "the input ends inside a GEMM\n");
            std::exit(2);
        }
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    VerilatedContext context;
    context.commandArgs(argc, argv);
    Vsystolic_array top{&context};
    std::mt19937 noise(1);
    std::vector<uint8_t> bytes(a_bytes + w_bytes);
    bool clean = true;

    const auto edge = [&top] {
        top.clk = 1;
        top.eval();
        top.clk = 0;
        top.eval();
    };

    top.clk = 0;
    top.start = 0;
    top.reset = 1;
    for (int i = 0; i < ROWS + COLS; i++) {
        edge();
    }
    top.reset = 0;

    Gemm gemm;
    while (read_gemm(gemm)) {
        top.slots = gemm.slots;
        top.tiles = gemm.tiles;
        top.start = 1;
        edge();
        top.start = 0;
        const uint64_t rows_out = static_cast<uint64_t>(gemm.tiles) * ROWS;
        const uint64_t limit = gemm.tiles * (static_cast<uint64_t>(gemm.slots) + 4 * (ROWS + COLS)) + 100;
        uint64_t taken = 0, left = 0, wrong = 0, first_work = 0, last_out = 0;
        // One turn is one clock cycle. Noise stands on the ports whenever the array does not ask.
        for (uint64_t cycle = 0; cycle < limit && left < rows_out; cycle++) {
            for (auto& byte : bytes) {
                byte = static_cast<uint8_t>(noise());
            }
            top.eval();
            const uint8_t* from = bytes.data();
            if (top.take) {
                const uint64_t tile = taken / gemm.slots;
                const uint64_t at = tile * gemm.slots + top.slot;
                if (tile >= gemm.tiles || top.slot != taken % gemm.slots) {
                    std::fprintf(stderr, "slot %u asked for out of turn\n", static_cast<unsigned>(top.slot));
                    return 2;
                }
                from = &gemm.operands[at * (a_bytes + w_bytes)];
                if (taken++ == 0) {
                    first_work = cycle + 1;  // taken now, in the operand registers of PE (0, 0) the cycle after
                }
            }
            put(top.a_in, from, a_bytes);
            put(top.w_in, from + a_bytes, w_bytes);
            top.eval();
            if (top.out_valid) {
                const uint64_t tile = left / ROWS;
                const uint64_t row = ROWS - 1 - left % ROWS;
                for (int col = 0; col < COLS; col++) {
                    const uint32_t want = gemm.expected[(tile * ROWS + row) * COLS + col];
                    if (get(top.acc_out, col) != want && wrong++ == 0) {
                        std::fprintf(stderr, "tile %llu, PE (%llu, %d) gives %d, not %d\n",
                                     static_cast<unsigned long long>(tile), static_cast<unsigned long long>(row), col,
                                     static_cast<int32_t>(get(top.acc_out, col)), static_cast<int32_t>(want));
                    }
                }
                left++;
                last_out = cycle;
            }
            edge();
        }
        clean = clean && wrong == 0 && left == rows_out;
        std::printf("%llu %llu %llu\n", static_cast<unsigned long long>(last_out - first_work + 1),
                    static_cast<unsigned long long>(left * COLS), static_cast<unsigned long long>(wrong));
    }
    top.final();
    return clean ? 0 : 1;
}
