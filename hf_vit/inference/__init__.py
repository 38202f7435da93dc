"""Faster inference at equal outputs."""
