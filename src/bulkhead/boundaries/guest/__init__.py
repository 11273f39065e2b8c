"""What every guest boundary shares: the protocol with the init inside, and plans for it."""
