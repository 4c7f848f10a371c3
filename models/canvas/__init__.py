"""Models that write on a canvas of random tokens: what hides a token there, and the class that reads them."""
