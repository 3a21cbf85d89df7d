"""What pretraining and fine-tuning share: checkpoints and resuming, signals, processes, schedules."""
