"""Floor 5: content-addressed blobs and one EROFS file per layer."""
