"""Parts any training repository has: processes, logging, checkpoints, schedules, optimizers."""
