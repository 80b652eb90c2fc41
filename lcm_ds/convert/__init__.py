"""Models in and out: Hugging Face folders of a run, and checkpoints of Meta's code."""
