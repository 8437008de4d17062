"""Cines: layouts, reading, the slice store, splits, batches."""
