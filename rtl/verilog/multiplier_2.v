// The flexible multiplier of a 2-threaded PE: two small multipliers, a shift each and one sum.
//
//      a bytes  w bytes  (one of each per unit: whose, the slot decides)
//        |        |
//     [nibble]    |            high/low half, alone or one of two
//        |        |
//       [swap ports?]          policy S+Aw only: a wide activation meets a narrow weight
//        | 5b     | 8b
//       [  product  ]          x 2 units
//             |
//           [<< 0, 4]          4 for a high half
//             |
//      [ + of the two units ] --> out
//
//      mode              unit 0     unit 1
//      8b x 8b           a.low w    a.high w       one pair
//      4b x 8b, twice    a w        a' w'          two pairs
//
// Combinational.
`default_nettype none

module multiplier_2 #(
    parameter SIGNED = 0,
    parameter SWAP   = 0
) (
    input  wire [15:0] a,
    input  wire [15:0] w,
    input  wire [1:0]  a_high,
    input  wire [1:0]  a_whole,
    input  wire [1:0]  swap,
    output wire [16:0] out
);
    wire [15:0] term [0:1];

    genvar u;
    generate
        for (u = 0; u < 2; u = u + 1) begin : unit
            wire [4:0]  half;
            wire [7:0]  weight;
            /* verilator lint_off UNUSEDSIGNAL */
            wire [12:0] xy;  // -2048..2047, 16 * -128 included: 12 bits hold it, the top one repeats the sign
            /* verilator lint_on UNUSEDSIGNAL */
            assign weight = w[8*u +: 8];
            nibble #(.SIGNED(SIGNED)) a_half (
                .value(a[8*u +: 8]), .high(a_high[u]), .whole(a_whole[u]), .out(half));
            if (SWAP == 0) begin : fixed
                product #(.XW(5), .YW(8), .X_SIGNED(SIGNED)) times (.x(half), .y(weight), .out(xy));
            end else begin : swapped
                wire [4:0] x;
                wire [7:0] y;
                assign x = swap[u] ? {weight[3], weight[3:0]} : half;
                assign y = swap[u] ? a[8*u +: 8] : weight;
                if (SIGNED != 0) begin : alike
                    product #(.XW(5), .YW(8), .X_SIGNED(1)) times (.x(x), .y(y), .out(xy));
                end else begin : mixed
                    mixed_product #(.XW(5), .YW(8)) times (.x_signed(swap[u]), .x(x), .y(y), .out(xy));
                end
            end
            assign term[u] = a_high[u] & ~swap[u] ? {xy[11:0], 4'b0} : {{4{xy[11]}}, xy[11:0]};
        end
    endgenerate

    assign out = {term[0][15], term[0]} + {term[1][15], term[1]};
endmodule

`default_nettype wire
