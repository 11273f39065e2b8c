"""`bulkhead compare`: what each boundary and its peers cost on this host, measured."""
