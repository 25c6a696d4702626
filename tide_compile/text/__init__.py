"""Texts: where they come from, and what the model writes itself."""
