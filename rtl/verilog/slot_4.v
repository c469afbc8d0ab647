// One slot of a 4-threaded PE: who gets which unit of the flexible multiplier.
//
//      a, w (4 pairs) --+--> [detect x 4] --> how many are active?  first?  last?
//                       |                        |
//                       |            +-----------+-----------------------------+
//                       |            v                                         v
//                       |   3 or 4: unit u takes pair u                  halves, wholes
//                       +-> else:   units 0, 1 take the first active pair,     |
//                                   units 2, 3 the last one                    |
//                                    |  (with one pair they are the same)      |
//                                    v                                         v
//                              [            multiplier_4            ] --> out
//
// POLICY 0 is S+A: a 2-way collision reduces each wide activation. POLICY 1 is S+Aw: not where the
// weight is narrow; then the weight takes the 4-bit port and both halves of the activation are used.
// Inactive pairs need no gating: one of their operands is zero, and so is every product of it. Combinational.
`default_nettype none

module slot_4 #(
    parameter POLICY = 0,
    parameter SIGNED = 0
) (
    input  wire [31:0] a,
    input  wire [31:0] w,
    output wire [18:0] out
);
    wire [3:0] active;
    wire [3:0] a_wide;
    wire [3:0] w_wide;

    genvar t;
    generate
        for (t = 0; t < 4; t = t + 1) begin : pair
            detect #(.SIGNED(SIGNED)) look (
                .a(a[8*t +: 8]), .w(w[8*t +: 8]),
                .active(active[t]), .a_wide(a_wide[t]), .w_wide(w_wide[t]));
        end
    endgenerate

    wire low_both = active[0] & active[1];
    wire top_both = active[2] & active[3];
    wire low_any  = active[0] | active[1];
    wire top_any  = active[2] | active[3];
    wire many = (low_both & top_any) | (top_both & low_any);  // three or four
    wire solo = ~(low_both | top_both | (low_any & top_any));  // one or none

    wire [3:0] first = {~active[2] & ~low_any, active[2] & ~low_any, active[1] & ~active[0], active[0]};
    wire [3:0] last  = {active[3], active[2] & ~active[3], active[1] & ~top_any, ~active[1] & ~top_any};

    wire [31:0] unit_a;
    wire [31:0] unit_w;
    wire [3:0]  a_high;
    wire [3:0]  a_whole;
    wire [3:0]  w_high;
    wire [3:0]  w_whole;

    // One-hot choice among the four pairs, flags included.
    function [17:0] choose(input [3:0] who, input [31:0] as, input [31:0] ws, input [3:0] a_flags, input [3:0] w_flags);
        integer i;
        begin
            choose = 18'b0;
            for (i = 0; i < 4; i = i + 1)
                choose = choose | ({a_flags[i], w_flags[i], as[8*i +: 8], ws[8*i +: 8]} & {18{who[i]}});
        end
    endfunction
    wire [17:0] first_pair = choose(first, a, w, a_wide, w_wide);
    wire [17:0] last_pair  = choose(last, a, w, a_wide, w_wide);

    genvar u;
    generate
        for (u = 0; u < 4; u = u + 1) begin : unit
            localparam ODD   = u % 2;
            localparam UPPER = u / 2;
            wire       wide_a;
            wire       wide_w;
            wire       spared;
            assign {wide_a, wide_w, unit_a[8*u +: 8], unit_w[8*u +: 8]} =
                many ? {a_wide[u], w_wide[u], a[8*u +: 8], w[8*u +: 8]} : (UPPER != 0 ? last_pair : first_pair);
            assign spared = (POLICY != 0) & ~many & ~solo & wide_a & ~wide_w;
            assign a_whole[u] = ~solo & ~spared;
            assign w_whole[u] = many | spared;
            assign a_high[u] = a_whole[u] ? wide_a : (solo ? UPPER != 0 : ODD != 0);
            assign w_high[u] = w_whole[u] ? wide_w : ODD != 0;
        end
    endgenerate

    multiplier_4 #(.SIGNED(SIGNED)) multiplier (
        .a(unit_a), .w(unit_w),
        .a_high(a_high), .a_whole(a_whole), .w_high(w_high), .w_whole(w_whole), .out(out));
endmodule

`default_nettype wire
