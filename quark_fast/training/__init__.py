"""The Quark loop: explore, quantize, learn."""
