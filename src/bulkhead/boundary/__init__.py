"""Floor 3: the seam between workloads and what isolates them."""
