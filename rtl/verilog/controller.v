// Counts the cycles of a tile: when to take the next slot, when to drain.
//
//      cycle of a tile   -1  0  1 ...  L-2  L-1 ... L+R+C-3 | L+R+C-2 ... L+2R+C-3
//      take               1  1  1 ...   1    0  ...    0    |    0    ...     1 (slot 0 of the next tile)
//      PE (0,0) works     .  x  x ...   x    x  ...         |
//      PE (R-1,C-1)       .  .  .        from R+C-2 on  x   |
//      drain              .  0  0 ...   0    0  ...    0    |    1    ...     1    R cycles
//
// A tile takes L + 2R + C - 2 cycles, and the next one starts right after: its slot 0 is taken, into the operand
// registers of PE (0,0), during the last cycle of this one. Only the first tile's cycle -1 is extra.
//
// start is seen while idle; slots (L, at least 1) and tiles (at least 1) must hold until done. reset must be held
// for R + C cycles: it drains, and nothing is taken, so that every register of the array becomes zero.
`default_nettype none

module controller #(
    parameter ROWS = 16,
    parameter COLS = 16
) (
    input  wire        clk,
    input  wire        reset,
    input  wire        start,
    input  wire [15:0] slots,
    input  wire [23:0] tiles,
    output wire        take,     // the operands on the ports are slot `slot` of the next (or this) tile
    output wire [15:0] slot,
    output wire        drain,    // accumulators move down
    output wire        out_valid // the bottom row holds results
);
    localparam FILL = ROWS + COLS - 2;

    reg        feeding;  // some tile is still to be fed, or being fed
    reg        working;  // a tile is being worked on
    reg [16:0] feed;     // cycle of the tile that is fed next, counted from its first take
    reg [16:0] work;     // cycle of the tile that is worked on: one behind
    reg [23:0] left;     // tiles not yet fed to the end

    wire [16:0] compute_cycles = {1'b0, slots} + FILL[16:0];
    wire [16:0] last = compute_cycles + ROWS[16:0] - 17'd1;

    assign take = feeding & (feed < {1'b0, slots});
    assign slot = feed[15:0];
    assign out_valid = working & (work >= compute_cycles);
    assign drain = reset | out_valid;

    always @(posedge clk) begin
        work <= feed;
        working <= ~reset & feeding;
        if (reset) begin
            feeding <= 1'b0;
            feed <= 17'd0;
            left <= 24'd0;
        end else if (feeding) begin
            feed <= feed == last ? 17'd0 : feed + 17'd1;
            if (feed == last) begin
                left <= left - 24'd1;
                feeding <= left != 24'd1;
            end
        end else if (start) begin
            feeding <= 1'b1;
            feed <= 17'd0;
            left <= tiles;
        end
    end
endmodule

`default_nettype wire
