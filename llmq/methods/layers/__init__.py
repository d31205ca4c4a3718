"""Replacements of linear layers that hold codes and scales."""
