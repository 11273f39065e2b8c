"""Programs built from native/: client, holder, init."""
