"""Floor 4: the processes that launch workloads and hold their stdio."""
