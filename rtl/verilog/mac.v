// Multiply and accumulate: one slot of T operand pairs a cycle, into one 32-bit accumulator.
//
//      a, w (T pairs)         acc_in (from the PE above)
//        |                      |
//     [ slot ]                  |
//        |                      |
//       [ + ]<------+           |
//        |          |           |
//      0 |  mux   1 |<----------+        drain picks 1
//        +---+------|
//            v      |
//        [ acc 32b ]+--> acc_out (to the PE below)
//
// THREADS = 1 is the plain 8b x 8b MAC of a conventional array. There is no reset: an array drained for
// as many cycles as it has rows holds zeros.
`default_nettype none

module mac #(
    parameter THREADS = 2,
    parameter POLICY  = 0,
    parameter SIGNED  = 0
) (
    input  wire                 clk,
    input  wire                 drain,
    input  wire [8*THREADS-1:0] a,
    input  wire [8*THREADS-1:0] w,
    input  wire [31:0]          acc_in,
    output reg  [31:0]          acc_out
);
    wire [18:0] sum;

    slot #(.THREADS(THREADS), .POLICY(POLICY), .SIGNED(SIGNED)) work (.a(a), .w(w), .out(sum));

    always @(posedge clk)
        acc_out <= drain ? acc_in : acc_out + {{13{sum[18]}}, sum};
endmodule

`default_nettype wire
