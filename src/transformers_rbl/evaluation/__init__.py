"""What pruning keeps and what it costs."""
