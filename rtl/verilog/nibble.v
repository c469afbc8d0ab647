// One operand byte as a port of a small multiplier sees it: its high or its low half.
//
//      value[7:4] --> [+] <-- AND <-- whole           high
//                      |       ^                        |
//                      |       round up:                v
//                      |       beyond half,       +---------+
//                      +-------or half and odd -->| 1       |
//      value[3:0] -- sign if whole and SIGNED --->| 0  mux  |--> out
//                                                 +---------+
//
// whole = 1: this half stands for the whole operand. The high half is rounded (half to even), and may become
//            one more than 4 bits hold: 248..255 gives 16, a weight of 120..127 gives +8. The low half is a narrow
//            operand and keeps its sign.
// whole = 0: the other half goes to another small multiplier. Both halves are exact; the low one is unsigned.
//
// out is two's complement if SIGNED, else unsigned. Combinational.
`default_nettype none

module nibble #(
    parameter SIGNED = 1
) (
    input  wire [7:0] value,
    input  wire       high,
    input  wire       whole,
    output wire [4:0] out
);
    wire round_up = whole & value[3] & (|value[2:0] | value[4]);
    wire [4:0] high_half = {(SIGNED != 0) & value[7], value[7:4]} + {4'b0, round_up};
    wire [4:0] low_half  = {(SIGNED != 0) & whole & value[3], value[3:0]};
    assign out = high ? high_half : low_half;
endmodule

`default_nettype wire
