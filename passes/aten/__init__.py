"""Passes that run inside Inductor, on the ATen graph of a piece."""
