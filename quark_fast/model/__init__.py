"""The policy and the reference: loading, reward tokens, one forward pass, export."""
