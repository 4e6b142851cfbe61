"""The testbed of handwritten digits among decoys."""
