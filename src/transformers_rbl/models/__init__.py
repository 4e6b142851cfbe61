"""Pruned models: the files that `save_pretrained(with_code=True)` copies, each importing only its neighbours."""
