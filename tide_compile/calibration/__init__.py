"""Calibration: from a model and some text to a router file."""
