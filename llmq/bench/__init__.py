"""Repeatable measurements, one method after the other, as JSON with their conditions."""
