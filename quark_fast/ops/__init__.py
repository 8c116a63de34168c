"""The fused loss: `loss` (public), `eager` (the equation), `cpp` (the kernels on the CPU)."""
