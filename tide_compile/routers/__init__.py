"""Routers: the networks, the bank of one model, its file, where it is found, what the passes need of it."""
