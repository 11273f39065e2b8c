"""Floor 2: one module per isolation mechanism; each plans and applies."""
