"""What the Hub gets: repositories of codebooks, checkpoints and recipes."""

from ..moved import forward


__getattr__ = forward("hub")  # 0.1.0 had a module of this name
