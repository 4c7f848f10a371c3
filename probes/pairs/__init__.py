"""What is asked: queries, pairs of a forward and a reverse query, and how text becomes them."""
