"""Datasets of concepts on disk, the order in which they are read, and the loader (see docs/architecture.md)."""
