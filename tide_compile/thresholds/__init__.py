"""Thresholds: their price, what they lead to, and certificates."""
