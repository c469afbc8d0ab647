"""What a GEMM on the array costs: memory traffic, stalls, events, energy. Never imports torch."""
