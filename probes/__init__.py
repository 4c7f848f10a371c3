"""What is measured: pairs of queries, the probes, and the readings they return."""
