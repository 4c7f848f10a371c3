"""The numbers of many runs as tables, on the terminal and over each other."""
