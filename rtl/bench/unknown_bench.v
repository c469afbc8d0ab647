// What a two-state simulator cannot see: nothing has a reset but the controller, so that after rows + cols cycles
// of reset no unknown may be left, and what stands on the ports while `take` is low must not get in.
// Prints "known" or "unknown".
`default_nettype none
`timescale 1ns / 1ns

module unknown_bench;
    localparam ROWS = 3;
    localparam COLS = 2;
    localparam THREADS = 4;

    reg                       clk = 0;
    reg                       reset = 1;
    reg                       start = 0;
    wire                      take;
    wire [15:0]               slot;
    wire                      out_valid;
    wire [32*COLS-1:0]        acc_out;
    wire [8*THREADS*ROWS-1:0] a_in = take ? {THREADS * ROWS{8'd200}} : {8 * THREADS * ROWS{1'bx}};
    wire [8*THREADS*COLS-1:0] w_in = take ? {THREADS * COLS{8'd100}} : {8 * THREADS * COLS{1'bx}};
    integer seen = 0;
    integer bad = 0;

    systolic_array #(.ROWS(ROWS), .COLS(COLS), .THREADS(THREADS)) machine (
        .clk(clk), .reset(reset), .start(start), .slots(16'd5), .tiles(24'd2), .a_in(a_in), .w_in(w_in),
        .take(take), .slot(slot), .out_valid(out_valid), .acc_out(acc_out));

    always #1 clk = ~clk;

    always @(negedge clk) if (!reset) begin
        if ((^{take, slot, out_valid, acc_out}) === 1'bx) bad = bad + 1;
        if (out_valid) begin
            // 5 slots of 4 pairs, each 192 * 96: 200 / 16 = 12.5 and 100 / 16 = 6.25 are rounded to 12 and 6.
            if (acc_out !== {COLS{32'd5 * 32'd4 * 32'd192 * 32'd96}}) bad = bad + 1;
            seen = seen + 1;
        end
    end

    initial begin
        repeat (ROWS + COLS) @(posedge clk);
        #1 reset = 0;
        start = 1;
        @(posedge clk);
        #1 start = 0;
        repeat (60) @(posedge clk);
        if (bad == 0 && seen == 2 * ROWS) $display("known");
        else $display("unknown");
        $finish;
    end
endmodule

`default_nettype wire
