"""One question to one model, and the edits after which it is asked again: what the dashboard's "Ask" shows."""
