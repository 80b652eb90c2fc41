"""lcm-ds: distributed training of Large Concept Models on DeepSpeed."""

__version__ = "0.1.0"
