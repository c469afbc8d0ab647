// Product of a signed and an unsigned operand, whichever way round.
//
//            x[XW-1:0]
//              |  |  |
//      y[0] --AND AND AND          the last column is negative when x is the signed one,
//      y[1] -- AND AND AND         the last row when y is; their corner is negative in both
//      ...      |   |   |          cases. Negative terms are inverted, constant ones put it
//              [+] [+] [+]         right (Baugh-Wooley).
//               |   |   |
//            out[XW+YW-1:0]
//
// One bit less on either side than a product of two signed operands that hold the same values. Combinational.
`default_nettype none

module mixed_product #(
    parameter XW = 5,
    parameter YW = 8
) (
    input  wire             x_signed,
    input  wire [XW-1:0]    x,
    input  wire [YW-1:0]    y,
    output reg  [XW+YW-1:0] out
);
    localparam W = XW + YW;

    // Minus v, n bits wide, is its inverse plus one minus 2^n: the 2^n lands on the same place in both cases.
    wire [W-1:0] correction = {1'b1, {W - 1{1'b0}}} | {{XW{1'b0}}, ~x_signed, {YW - 1{1'b0}}}
        | {{YW{1'b0}}, x_signed, {XW - 1{1'b0}}};

    reg [XW-1:0] row;
    integer i;
    always @* begin
        out = correction;
        for (i = 0; i < YW; i = i + 1) begin
            row = (x & {XW{y[i]}})
                ^ (i == YW - 1 ? {1'b1, {XW - 1{~x_signed}}} : {x_signed, {XW - 1{1'b0}}});
            out = out + ({{YW{1'b0}}, row} << i);
        end
    end
endmodule

`default_nettype wire
