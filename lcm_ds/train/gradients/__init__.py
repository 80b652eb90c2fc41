"""DeepSpeed's gradients: their sum over ranks and their norms, with fewer operations."""
