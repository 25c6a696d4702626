"""Run time: the executor, and what it needs while a graph runs."""
