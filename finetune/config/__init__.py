"""What was asked for: runs and sweeps as checked objects, read from YAML."""
