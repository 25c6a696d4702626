"""Inspection: what the compiler did with a graph, as text, files and pages."""
