"""Prompts, tokenizers and the embedded data."""
