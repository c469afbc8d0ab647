// R x C processing elements: activations move right, weights down, accumulators down while draining.
//
//              w_in[0]   w_in[1]        0 enters the accumulators at the top
//                 |         |
//      a_in[0]--[PE 00]--[PE 01]--
//                 |         |
//      a_in[1]--[PE 10]--[PE 11]--
//                 |         |
//             acc_out[0] acc_out[1]     row R-1 first
//
// Row i of a_in is a_in[8*T*i +: 8*T], column j of w_in and acc_out likewise.
`default_nettype none

(* keep_hierarchy *)
module pe_array #(
    parameter ROWS    = 16,
    parameter COLS    = 16,
    parameter THREADS = 2,
    parameter POLICY  = 0,
    parameter SIGNED  = 0
) (
    input  wire                      clk,
    input  wire                      drain,
    input  wire [8*THREADS*ROWS-1:0] a_in,
    input  wire [8*THREADS*COLS-1:0] w_in,
    output wire [32*COLS-1:0]        acc_out
);
    localparam B = 8 * THREADS;

    // Wires between neighbours; the last ones to the right and (weights) at the bottom end there.
    /* verilator lint_off UNUSEDSIGNAL */
    wire [B-1:0]  a_wire [0:ROWS*(COLS+1)-1];
    wire [B-1:0]  w_wire [0:(ROWS+1)*COLS-1];
    /* verilator lint_on UNUSEDSIGNAL */
    wire [31:0] acc_wire [0:(ROWS+1)*COLS-1];

    genvar i, j;
    generate
        for (i = 0; i < ROWS; i = i + 1) begin : left
            assign a_wire[i*(COLS+1)] = a_in[B*i +: B];
        end
        for (j = 0; j < COLS; j = j + 1) begin : edges
            assign w_wire[j] = w_in[B*j +: B];
            assign acc_wire[j] = 32'b0;
            assign acc_out[32*j +: 32] = acc_wire[ROWS*COLS+j];
        end
        for (i = 0; i < ROWS; i = i + 1) begin : row
            for (j = 0; j < COLS; j = j + 1) begin : col
                pe #(.THREADS(THREADS), .POLICY(POLICY), .SIGNED(SIGNED)) element (
                    .clk(clk), .drain(drain),
                    .a_in(a_wire[i*(COLS+1)+j]), .w_in(w_wire[i*COLS+j]), .acc_in(acc_wire[i*COLS+j]),
                    .a_out(a_wire[i*(COLS+1)+j+1]), .w_out(w_wire[(i+1)*COLS+j]),
                    .acc_out(acc_wire[(i+1)*COLS+j]));
            end
        end
    endgenerate
endmodule

`default_nettype wire
