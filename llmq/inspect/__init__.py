"""What happens inside a model while it runs: hooks as context managers, and statistics of activation outliers."""
