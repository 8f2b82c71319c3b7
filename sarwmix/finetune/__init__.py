"""Fine-tuning, probes and their results."""
