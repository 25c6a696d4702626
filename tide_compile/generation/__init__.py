"""Generation: the engine, and how ``generate`` reaches compiled code."""
