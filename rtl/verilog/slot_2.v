// One slot of a 2-threaded PE: who gets which unit of the flexible multiplier.
//
//      a, w (2 pairs) --+--> [detect x 2] --> both active?
//                       |                        |
//                       |            +-----------+---------------+
//                       |            v                           v
//                       +-> both:    unit u takes pair u   halves, wholes, swaps
//                           one:     both take that pair         |
//                                    |                           |
//                                    v                           v
//                              [         multiplier_2          ] --> out
//
// POLICY 0 is S+A: a collision reduces each wide activation. POLICY 1 is S+Aw: not where the weight is
// narrow; then the operands swap ports. Inactive pairs need no gating: one of their operands is zero, and
// so is every product of it. Combinational.
`default_nettype none

module slot_2 #(
    parameter POLICY = 0,
    parameter SIGNED = 0
) (
    input  wire [15:0] a,
    input  wire [15:0] w,
    output wire [16:0] out
);
    wire [1:0] active;
    wire [1:0] a_wide;
    wire [1:0] w_wide;

    genvar t;
    generate
        for (t = 0; t < 2; t = t + 1) begin : pair
            detect #(.SIGNED(SIGNED)) look (
                .a(a[8*t +: 8]), .w(w[8*t +: 8]),
                .active(active[t]), .a_wide(a_wide[t]), .w_wide(w_wide[t]));
        end
    endgenerate

    wire both = &active;

    wire [15:0] unit_a;
    wire [15:0] unit_w;
    wire [1:0]  a_high;
    wire [1:0]  a_whole;
    wire [1:0]  swap;

    genvar u;
    generate
        for (u = 0; u < 2; u = u + 1) begin : unit
            wire lent;  // this unit works for the other thread, whose pair is the only active one
            assign lent = ~active[u];
            assign unit_a[8*u +: 8] = lent ? a[8*(1-u) +: 8] : a[8*u +: 8];
            assign unit_w[8*u +: 8] = lent ? w[8*(1-u) +: 8] : w[8*u +: 8];
            assign swap[u] = (POLICY != 0) & both & a_wide[u] & ~w_wide[u];
            assign a_whole[u] = both;
            assign a_high[u] = both ? a_wide[u] : u != 0;
        end
    endgenerate

    multiplier_2 #(.SIGNED(SIGNED), .SWAP(POLICY)) multiplier (
        .a(unit_a), .w(unit_w), .a_high(a_high), .a_whole(a_whole), .swap(swap), .out(out));
endmodule

`default_nettype wire
