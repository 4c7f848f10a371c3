"""How queries are run: batches, the fused pass of the three probes, edited and linearized passes."""
