"""Virtual machine monitors that run inside a jail, and what they boot."""
