"""How a codebook is made, or taken over from upstream's files."""
