"""The fused loss: `loss` (public), `linear` (from hidden states), `eager` (the equation), `cpp` (CPU)."""
