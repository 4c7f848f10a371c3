"""Facts that nobody has: other facts said as a relation says its own, and files that look like the published ones."""
