// Every kind of slot side by side, all fed with the same operand bytes.
//
//      a, w (4 pairs) --+--> [slot T=1 u8] --> out[ 0]
//                       +--> [slot T=1 s8] --> out[ 1]
//                       +--> [slot T=2 S+A  u8] ...
//                       ...                    out[ 9]
//
// Slots of fewer threads take the first pairs. The order is that of KINDS in ../twin.py.
`default_nettype none

module slot_bench (
    input  wire [31:0]  a,
    input  wire [31:0]  w,
    output wire [319:0] out
);
    wire [18:0] value [0:9];

    slot #(.THREADS(1), .POLICY(0), .SIGNED(0)) s0 (.a(a[7:0]), .w(w[7:0]), .out(value[0]));
    slot #(.THREADS(1), .POLICY(0), .SIGNED(1)) s1 (.a(a[7:0]), .w(w[7:0]), .out(value[1]));

    genvar p, s, k;
    generate
        for (p = 0; p < 2; p = p + 1) begin : policy
            for (s = 0; s < 2; s = s + 1) begin : sign
                slot #(.THREADS(2), .POLICY(p), .SIGNED(s)) two (.a(a[15:0]), .w(w[15:0]), .out(value[2+2*p+s]));
                slot #(.THREADS(4), .POLICY(p), .SIGNED(s)) four (.a(a), .w(w), .out(value[6+2*p+s]));
            end
        end
        for (k = 0; k < 10; k = k + 1) begin : widen
            assign out[32*k +: 32] = {{13{value[k][18]}}, value[k]};
        end
    endgenerate
endmodule

`default_nettype wire
