// One slot: the sum of T products, through the multiplier that T threads share.
//
//      a, w (T pairs) --> [ product 8b x 8b | slot_2 | slot_4 ] --> out, sign-extended to 19 bits
//                               T = 1         T = 2    T = 4
//
// Pair t is a[8t+7:8t], w[8t+7:8t]. Combinational.
`default_nettype none

module slot #(
    parameter THREADS = 2,
    parameter POLICY  = 0,
    parameter SIGNED  = 0
) (
    input  wire [8*THREADS-1:0] a,
    input  wire [8*THREADS-1:0] w,
    output wire [18:0]          out
);
    generate
        if (THREADS == 1) begin : one
            wire [15:0] sum;
            product #(.XW(8), .YW(8), .X_SIGNED(SIGNED)) multiplier (.x(a), .y(w), .out(sum));
            assign out = {{3{sum[15]}}, sum};
        end else if (THREADS == 2) begin : two
            wire [16:0] sum;
            slot_2 #(.POLICY(POLICY), .SIGNED(SIGNED)) shared (.a(a), .w(w), .out(sum));
            assign out = {{2{sum[16]}}, sum};
        end else begin : four
            slot_4 #(.POLICY(POLICY), .SIGNED(SIGNED)) shared (.a(a), .w(w), .out(out));
        end
    endgenerate
endmodule

`default_nettype wire
