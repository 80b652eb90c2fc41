"""lcm-ds: distributed training of Large Concept Models on DeepSpeed."""

import logging

__version__ = "0.1.0"

# DeepSpeed warns whenever it finds no GPU, as it is imported; a run says in its first line what it runs on.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
