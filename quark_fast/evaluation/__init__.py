"""Held-out prompts, before and after: samples, scores, perplexity, the probe."""
