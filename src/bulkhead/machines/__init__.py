"""Whole machines: their disks, what is on them, and what boots them."""
