"""On-policy training: what it was worth, for which tokens, and what window rules do to lengths that are known."""
