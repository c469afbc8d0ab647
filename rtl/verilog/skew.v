// Delays lane i by i cycles, so that operands enter the array as a slanted front.
//
//      in[0] -------------------> out[0]
//      in[1] --[reg]------------> out[1]
//      in[2] --[reg]-[reg]------> out[2]
//      ...
//
// WIDTH bits a lane.
`default_nettype none

module skew #(
    parameter LANES = 16,
    parameter WIDTH = 16
) (
    input  wire                   clk,
    input  wire [WIDTH*LANES-1:0] in,
    output wire [WIDTH*LANES-1:0] out
);
    assign out[0 +: WIDTH] = in[0 +: WIDTH];

    genvar i;
    generate
        for (i = 1; i < LANES; i = i + 1) begin : lane
            reg [WIDTH*i-1:0] line;
            assign out[WIDTH*i +: WIDTH] = line[WIDTH*(i-1) +: WIDTH];
            if (i == 1) begin : short
                always @(posedge clk) line <= in[WIDTH*i +: WIDTH];
            end else begin : long
                always @(posedge clk) line <= {line[0 +: WIDTH*(i-1)], in[WIDTH*i +: WIDTH]};
            end
        end
    endgenerate
endmodule

`default_nettype wire
