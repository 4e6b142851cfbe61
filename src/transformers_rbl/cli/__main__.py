"""`python -m transformers_rbl.cli`, the same as `rbl`: what `accelerate launch -m` needs."""

from . import app


app()
