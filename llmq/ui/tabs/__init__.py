"""The tabs and their panels: controls, handlers that return dicts keyed by component, and their wiring."""
