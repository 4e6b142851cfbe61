"""Plugins that other engines find by entry points: vLLM and lmms-eval."""
