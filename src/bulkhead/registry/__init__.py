"""Floor 5: a client of the OCI distribution specification."""
