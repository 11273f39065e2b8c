"""`bulkhead-runtime`: the container boundary with the command line of an OCI runtime."""
