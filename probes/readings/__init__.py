"""What a probe returns: a tidy frame with its number, interval, control and provenance, in parquet."""
