"""A LLaMA on a CPU in C: one call a token, weights packed for a linear stream. Compiled on first use."""
