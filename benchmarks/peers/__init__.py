"""Side-by-side studies of pruning methods; each is one command."""
