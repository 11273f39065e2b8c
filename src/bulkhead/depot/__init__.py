"""A registry of our own: the OCI distribution specification over the content store."""
