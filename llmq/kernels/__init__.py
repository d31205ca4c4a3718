"""The operations of a decode step, each defined once in `reference` and made fast elsewhere with the same signature."""
