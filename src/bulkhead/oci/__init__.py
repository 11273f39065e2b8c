"""Floor 1: the OCI specifications as typed data, without I/O."""
