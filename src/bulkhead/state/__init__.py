"""Floor 5: SQLite records with numbered migrations."""
