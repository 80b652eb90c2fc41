"""Checkpoints of a run: their format, saving and loading."""
