"""Dockerfile builds: the language, the stages, the cache, and making images of them."""
