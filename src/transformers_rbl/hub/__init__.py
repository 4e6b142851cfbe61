"""What the Hub gets: repositories of codebooks, checkpoints and recipes."""
