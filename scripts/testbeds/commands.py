"""Every command of the testbeds, by name."""

import typer

from . import assembling, comparison, files, positions, recipes, report, training, variants
from .digits import pictures
from .leaderboard import command as leaderboard
from .scenes import checkpoint, comparing, tables
from .scenes import pictures as scenes_pictures
from .scenes import training as scenes_training


app = typer.Typer(help="Train small models, and measure what pruning costs them.", no_args_is_help=True)
app.command("images")(files.write_images)
app.command("questions")(files.write_questions)
app.command("train")(training.main)
app.command("compare-rules")(comparison.main)
app.command("compare-recipes")(recipes.main)
app.command("compare-codebooks")(variants.main)
app.command("compare-positions")(positions.main)
app.command("leaderboard")(leaderboard.main)
app.command("report")(report.main)
app.command("assemble")(assembling.main)
app.command("pictures")(pictures.main)
app.command("scenes")(checkpoint.command)
app.command("scenes-answers")(scenes_training.answers_again)
app.command("scenes-compare")(comparing.main)
app.command("scenes-tables")(tables.main)
app.command("scenes-pictures")(scenes_pictures.main)
