"""One loaded (model, method) on one device: prefill, decode step, exact ledger. Knows nothing of who compares what."""
