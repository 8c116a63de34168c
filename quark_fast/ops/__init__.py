"""The fused losses: the equation in PyTorch, the C++ and the Triton kernels."""
