// The whole machine: an output-stationary array with its skewed feeding, its serial drain and its control.
//
//      start, slots, tiles --> [controller] --> take, slot (to the memories)      out_valid
//                                   | drain
//                  w_in --take--> [skew]
//                                   |
//      a_in --take--> [skew] --> [pe_array R x C] --> acc_out, C columns a cycle, row R-1 first
//
// The memories put slot `slot` of the tile on a_in (rows) and w_in (columns) in the same cycle that asks for it.
// What stands there while take is low is ignored.
`default_nettype none

module systolic_array #(
    parameter ROWS    = 16,
    parameter COLS    = 16,
    parameter THREADS = 2,
    parameter POLICY  = 0,
    parameter SIGNED  = 0
) (
    input  wire                      clk,
    input  wire                      reset,
    input  wire                      start,
    input  wire [15:0]               slots,
    input  wire [23:0]               tiles,
    input  wire [8*THREADS*ROWS-1:0] a_in,
    input  wire [8*THREADS*COLS-1:0] w_in,
    output wire                      take,
    output wire [15:0]               slot,
    output wire                      out_valid,
    output wire [32*COLS-1:0]        acc_out
);
    localparam B = 8 * THREADS;

    wire            drain;
    wire [B*ROWS-1:0] a_front;
    wire [B*COLS-1:0] w_front;

    controller #(.ROWS(ROWS), .COLS(COLS)) control (
        .clk(clk), .reset(reset), .start(start), .slots(slots), .tiles(tiles),
        .take(take), .slot(slot), .drain(drain), .out_valid(out_valid));

    skew #(.LANES(ROWS), .WIDTH(B)) a_skew (.clk(clk), .in(a_in & {B*ROWS{take}}), .out(a_front));
    skew #(.LANES(COLS), .WIDTH(B)) w_skew (.clk(clk), .in(w_in & {B*COLS{take}}), .out(w_front));

    pe_array #(.ROWS(ROWS), .COLS(COLS), .THREADS(THREADS), .POLICY(POLICY), .SIGNED(SIGNED)) elements (
        .clk(clk), .drain(drain), .a_in(a_front), .w_in(w_front), .acc_out(acc_out));
endmodule

`default_nettype wire
