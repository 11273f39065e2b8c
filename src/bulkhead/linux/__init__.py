"""Floor 0: the kernel as typed Python; the only place with ctypes."""
