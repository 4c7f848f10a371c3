"""How readings are drawn. A figure takes what it draws; it builds no reading."""
