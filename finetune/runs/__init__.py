"""Runs and sweeps: one folder each, resumable after any kind of stop."""
