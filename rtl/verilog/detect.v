// What the control of a slot must know about one operand pair.
//
//      a[7:0] ---+--> not zero --AND--> active
//      w[7:0] -+-|--> not zero ---'
//              | +--> wide ? ---------> a_wide      above 15, or outside [-8, 7] if SIGNED
//              +----> wide ? ---------> w_wide      outside [-8, 7]
//
// Combinational.
`default_nettype none

module detect #(
    parameter SIGNED = 0
) (
    input  wire [7:0] a,
    input  wire [7:0] w,
    output wire       active,
    output wire       a_wide,
    output wire       w_wide
);
    assign active = |a & |w;
    assign a_wide = SIGNED != 0 ? (a[7:3] != 5'b00000) & (a[7:3] != 5'b11111) : |a[7:4];
    assign w_wide = (w[7:3] != 5'b00000) & (w[7:3] != 5'b11111);
endmodule

`default_nettype wire
