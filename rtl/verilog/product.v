// Signed product of two short operands, as an array of single-bit partial products.
//
//            x[XW-1:0]
//              |  |  |
//      y[0] --AND AND AND          each row is x or nothing, one place further left;
//      y[1] -- AND AND AND         rows and columns of negative weight are inverted and
//      ...      |   |   |          two or three constant ones put it right (Baugh-Wooley)
//              [+] [+] [+]
//               |   |   |
//            out[XW+YW-1:0]
//
// y is two's complement; x is two's complement if X_SIGNED, else unsigned. Combinational.
`default_nettype none

module product #(
    parameter XW       = 5,
    parameter YW       = 5,
    parameter X_SIGNED = 1
) (
    input  wire [XW-1:0]    x,
    input  wire [YW-1:0]    y,
    output reg  [XW+YW-1:0] out
);
    localparam W = XW + YW;
    localparam [W-1:0] ONE = 1;
    // The last row is negative: minus v is the inverse of v plus one; so is the last column if x is signed.
    localparam [W-1:0] CORRECTION = X_SIGNED != 0
        ? (ONE << (W - 1)) + (ONE << (YW - 1)) + (ONE << (XW - 1))
        : (ONE << (W - 1)) + (ONE << (YW - 1));
    localparam [XW-1:0] LAST_COLUMN = X_SIGNED != 0 ? {1'b1, {XW - 1{1'b0}}} : {XW{1'b0}};

    reg [XW-1:0] row;
    integer i;
    always @* begin
        out = CORRECTION;
        for (i = 0; i < YW; i = i + 1) begin
            row = (x & {XW{y[i]}}) ^ (i == YW - 1 ? ~LAST_COLUMN : LAST_COLUMN);
            out = out + ({{YW{1'b0}}, row} << i);
        end
    end
endmodule

`default_nettype wire
