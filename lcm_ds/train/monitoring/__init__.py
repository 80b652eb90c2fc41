"""What a run reports: console, metrics.jsonl, TensorBoard, trackers, traces."""
