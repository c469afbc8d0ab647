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
    // Swapped ports take what either operand may be: a weight is signed, an activation may be unsigned.
    localparam XW = SWAP != 0 && SIGNED == 0 ? 6 : 5;
    localparam YW = SWAP != 0 && SIGNED == 0 ? 9 : 8;
    localparam X_SIGNED = SWAP != 0 ? 1 : SIGNED;

    wire [15:0] term [0:1];

    genvar u;
    generate
        for (u = 0; u < 2; u = u + 1) begin : unit
            wire [4:0]       half;
            wire [XW-1:0]    x;
            wire [YW-1:0]    y;
            /* verilator lint_off UNUSEDSIGNAL */
            wire [XW+YW-1:0] xy;  // -2048..2047, 16 * -128 included: 12 bits hold it, the others repeat the sign
            /* verilator lint_on UNUSEDSIGNAL */
            nibble #(.SIGNED(SIGNED)) a_half (
                .value(a[8*u +: 8]), .high(a_high[u]), .whole(a_whole[u]), .out(half));
            if (SWAP == 0) begin : fixed
                assign x = half;
                assign y = w[8*u +: 8];
            end else if (SIGNED == 0) begin : swapped
                assign x = swap[u] ? {{2{w[8*u+3]}}, w[8*u +: 4]} : {1'b0, half};
                assign y = swap[u] ? {1'b0, a[8*u +: 8]} : {w[8*u+7], w[8*u +: 8]};
            end else begin : swapped
                assign x = swap[u] ? {w[8*u+3], w[8*u +: 4]} : half;
                assign y = swap[u] ? a[8*u +: 8] : w[8*u +: 8];
            end
            product #(.XW(XW), .YW(YW), .X_SIGNED(X_SIGNED)) times (.x(x), .y(y), .out(xy));
            assign term[u] = a_high[u] & ~swap[u] ? {xy[11:0], 4'b0} : {{4{xy[11]}}, xy[11:0]};
        end
    endgenerate

    assign out = {term[0][15], term[0]} + {term[1][15], term[1]};
endmodule

`default_nettype wire
