"""How to reach inside: attention taps, per-example gradient products, and the promise to leave no trace."""
