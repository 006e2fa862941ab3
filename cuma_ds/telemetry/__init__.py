"""What a run tells while it runs: metrics.jsonl, TensorBoard, a progress bar, throughput."""
