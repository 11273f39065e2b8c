"""Floor 5: images: pull, push, load, save, commit, bootstrap."""
