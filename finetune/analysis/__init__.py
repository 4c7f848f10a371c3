"""What is worked out from a finished run's checkpoints."""
