"""Predictions for many images: in memory, or in a table on disk."""
