"""Section 6 in miniature: its runs as tables, what they say of every prediction, and the page of both."""
