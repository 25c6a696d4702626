"""Lowering: from pieces of a graph to code by Inductor."""
