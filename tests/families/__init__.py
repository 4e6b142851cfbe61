"""Every contract over every family of FAMILIES: tiny random models of the real architectures, and an oracle."""
