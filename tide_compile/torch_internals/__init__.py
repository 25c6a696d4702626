"""What is used of torch beyond its public names: one file per concern."""
