"""Sampling completions: with transformers, with vLLM, or shared between runs."""
