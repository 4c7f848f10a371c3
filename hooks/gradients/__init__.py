"""Inner products of per-example parameter gradients, without forming a gradient."""
