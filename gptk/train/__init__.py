"""Training a GPT: configuration, loop, schedule, checkpoints, metrics."""
