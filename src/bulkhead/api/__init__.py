"""Floor 9: the Docker Engine API, served by the engine's process on its loop.

Imported by name when the first client of an API socket connects (`engine.doors`).
"""
