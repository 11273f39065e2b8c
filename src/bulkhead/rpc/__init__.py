"""Floor 1: the frames and messages between clients and the engine."""
