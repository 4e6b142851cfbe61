"""The app.py of a Hugging Face Space: RBL_MODEL, RBL_CODEBOOK and RBL_IMAGES say what to load."""

import os

from transformers_rbl.demo import launch, load_demo


if __name__ == "__main__":
    model, codebook, images = (os.environ.get(name) or None for name in ("RBL_MODEL", "RBL_CODEBOOK", "RBL_IMAGES"))
    launch(load_demo(model, codebook, images))
