"""What runs inside the guests: first process, reporter, scenarios only they can play."""
