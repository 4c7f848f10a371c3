"""What people look at; nothing below imports it."""
