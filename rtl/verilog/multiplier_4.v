// The flexible multiplier of a 4-threaded PE: four small multipliers, their shifts and one sum.
//
//      a bytes  w bytes  (one of each per unit: whose, the slot decides)
//        |        |
//     [nibble] [nibble]        high/low half, alone or one of two
//        |  5b    |  5b
//       [  product  ]          x 4 units
//             |
//           [<< 0, 4, 8]       4 for each high half among its two
//             |
//      [ + of the four units ] --> out
//
//      mode              unit 0         unit 1         unit 2         unit 3
//      8b x 8b           a.low w.low    a.low w.high   a.high w.low   a.high w.high   one pair
//      4b x 8b, twice    a w.low        a w.high       a' w'.low      a' w'.high      two pairs
//      8b x 4b, twice    a.low w        a.high w       a'.low w'      a'.high w'      (policy S+Aw, pair by pair)
//      4b x 4b, 4 times  a0 w0          a1 w1          a2 w2          a3 w3           four pairs
//
// The mode is nothing but the bits a_high, a_whole, w_high, w_whole of each unit. Combinational.
`default_nettype none

module multiplier_4 #(
    parameter SIGNED = 0
) (
    input  wire [31:0] a,
    input  wire [31:0] w,
    input  wire [3:0]  a_high,
    input  wire [3:0]  a_whole,
    input  wire [3:0]  w_high,
    input  wire [3:0]  w_whole,
    output wire [18:0] out
);
    wire [16:0] term [0:3];

    genvar u;
    generate
        for (u = 0; u < 4; u = u + 1) begin : unit
            wire [4:0]  x;
            wire [4:0]  y;
            /* verilator lint_off UNUSEDSIGNAL */
            wire [9:0]  xy;  // -128..240: 9 bits hold it, the top one repeats the sign
            /* verilator lint_on UNUSEDSIGNAL */
            wire [12:0] shifted_once;
            nibble #(.SIGNED(SIGNED)) a_half (
                .value(a[8*u +: 8]), .high(a_high[u]), .whole(a_whole[u]), .out(x));
            nibble #(.SIGNED(1)) w_half (
                .value(w[8*u +: 8]), .high(w_high[u]), .whole(w_whole[u]), .out(y));
            product #(.XW(5), .YW(5), .X_SIGNED(SIGNED)) times (.x(x), .y(y), .out(xy));
            assign shifted_once = a_high[u] ? {xy[8:0], 4'b0} : {{4{xy[8]}}, xy[8:0]};
            assign term[u] = w_high[u] ? {shifted_once, 4'b0} : {{4{shifted_once[12]}}, shifted_once};
        end
    endgenerate

    // 19 bits: four times 256 * 128 is 2^17, one more than 18 bits hold.
    assign out = {{2{term[0][16]}}, term[0]} + {{2{term[1][16]}}, term[1]}
               + {{2{term[2][16]}}, term[2]} + {{2{term[3][16]}}, term[3]};
endmodule

`default_nettype wire
