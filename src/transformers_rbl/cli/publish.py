"""`rbl publish`: upload to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .shared import app, one_sentence


@app.command()
@one_sentence
def publish(
    folder: Annotated[Path, typer.Argument(help="A folder laid out as its repository, e.g. one of codebooks/.")],
    repo: Annotated[str, typer.Argument(help="Hub id to publish it under; made if missing.")],
    dry_run: Annotated[bool, typer.Option(help="List what would go, and stop.")] = False,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload a codebook, checkpoint or recipe to the Hub as it is. The token is that of `hf auth login` or HF_TOKEN."""
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  of whichever httpx it uses: connections fail with it
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils import validate_repo_id

    from ..hub.publish import files_to_publish
    from ..hub.publish import publish as upload
    from ..models.names import hub_words

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ValueError(
            f"{repo!r} is no repository's name: give one such as org/rbl-codebook, of letters, digits and . _ -."
        ) from None
    table = Table(title=f"{folder} as {repo}")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, size in files_to_publish(folder):
        table.add_row(name, f"{size:,}")
    Console().print(table)
    if dry_run:
        Console().print("Nothing was uploaded.")
        return
    try:
        info = upload(folder, repo, private or None, None, revision, create_pr, message)
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise OSError(hub_words(error, repo)) from error
    Console().print(f"[bold]{info.pr_url or info.commit_url}[/bold]")
