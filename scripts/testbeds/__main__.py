"""Every command of the testbeds: `python scripts/testbeds COMMAND`, from the checkout's root."""

import sys
from pathlib import Path

import typer


sys.path[0] = str(Path(__file__).resolve().parents[1])  # scripts/, which Python puts there for a script that lies in it

from testbeds import assembling, comparison, recipes, report  # noqa: E402
from testbeds.digits import data, pictures, training  # noqa: E402


app = typer.Typer(help="Train small models, and measure what pruning costs them.", no_args_is_help=True)
app.command("images")(data.write_images)
app.command("questions")(data.write_questions)
app.command("train")(training.main)
app.command("compare-rules")(comparison.main)
app.command("compare-recipes")(recipes.main)
app.command("report")(report.main)
app.command("assemble")(assembling.main)
app.command("pictures")(pictures.main)


if __name__ == "__main__":
    app()
