"""The engine's records: SQLite with numbered migrations."""
