// One processing element: operand registers, and the MAC that works on what they hold.
//
//                 w_in        acc_in
//                  |            |
//               [w reg]---+     |
//                  |      |     |
//      a_in-[a reg]-+---[ mac ]-+
//             |    |            |
//             |    |          acc_out     (down, while draining)
//             |  w_out                    (down)
//           a_out                         (right)
//
// A cycle of the PE is a cycle in which its operand registers hold a slot: it enters them at the end of the
// cycle before, and what it adds is in the accumulator at the end of this one.
`default_nettype none

(* keep_hierarchy *)
module pe #(
    parameter THREADS = 2,
    parameter POLICY  = 0,
    parameter SIGNED  = 0
) (
    input  wire                 clk,
    input  wire                 drain,
    input  wire [8*THREADS-1:0] a_in,
    input  wire [8*THREADS-1:0] w_in,
    input  wire [31:0]          acc_in,
    output reg  [8*THREADS-1:0] a_out,
    output reg  [8*THREADS-1:0] w_out,
    output wire [31:0]          acc_out
);
    always @(posedge clk) begin
        a_out <= a_in;
        w_out <= w_in;
    end

    mac #(.THREADS(THREADS), .POLICY(POLICY), .SIGNED(SIGNED)) accumulate (
        .clk(clk), .drain(drain), .a(a_out), .w(w_out), .acc_in(acc_in), .acc_out(acc_out));
endmodule

`default_nettype wire
