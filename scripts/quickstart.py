"""Ask a LLaVA model about photos, stock and pruned: both answers, visual tokens, KV cache, prefill time, and a
picture.

python scripts/quickstart.py                  # the small trained checkpoint of this repository, no network
python scripts/quickstart.py --model llava-hf/llama3-llava-next-8b-hf --codebook org/book --image a.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor

from testbeds.digits.questions import examples
from transformers_rbl import PruningConfig, rbl_class
from transformers_rbl.evaluation.evaluate import prompt_text
from transformers_rbl.evaluation.plots import plot_kept
from transformers_rbl.evaluation.timing import compare_prefills
from transformers_rbl.inputs import image_arguments, image_runs, layout_of
from transformers_rbl.wording import describe_pruning


OFF = PruningConfig(enabled=False)
# Trained by `scripts/testbeds train` on digits among decoys; its codebook is inside.
DEFAULT = Path(__file__).resolve().parents[1] / "codebooks" / "digits-llava-next"
DEFAULT_PROMPT, PROMPT = "which digits are there?", "What is shown in this image?"


def held_out_images() -> list[Image.Image]:
    """Two images of glyphs, photo regions and compositions that the default model never saw."""
    return [example.pictures()[0] for example in examples("llava_next", "image", "test", 2, 11, (2, 1))]


def sample_photos() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(photo) for photo in load_sample_images().images]


def run(
    model_id: str | Path | None,
    codebook: str | None,
    images: list[Path] | None,
    prompt: str | None,
    keep_ratio: float | None,
    threshold: float | None,
    max_new_tokens: int,
    repeats: int,
    out: Path,
) -> None:
    """Both answers of every photo as a table, and the picture at `out`."""
    console = Console()
    if model_id is None:
        if codebook is not None:
            raise ValueError("--codebook belongs to a model: give --model too.")
        model_id, prompt = DEFAULT, prompt or DEFAULT_PROMPT
        console.print(f"A small model that was trained to read digits among decoys: [bold]{model_id}[/bold]")
    photos = [Image.open(path).convert("RGB") for path in images or ()]
    photos = photos or (held_out_images() if model_id == DEFAULT else sample_photos())
    prompt = prompt or PROMPT
    dtype = "auto" if torch.cuda.is_available() else "float32"  # half precision is slow on most CPUs
    model = rbl_class(model_id).from_pretrained(
        model_id, codebook=codebook, keep_ratio=keep_ratio, threshold=threshold, dtype=dtype
    )
    if model.pruning is None:
        raise ValueError(
            "No pruning setting: give --keep-ratio or --threshold, and --codebook unless the model has one."
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    processor = AutoProcessor.from_pretrained(model_id)

    table = Table(title=f"{Path(str(model_id)).name}, {describe_pruning(model.pruning)}, {model.device}, {model.dtype}")
    for column in ("photo", "visual tokens", "KV cache", "prefill, median", "answer"):
        table.add_column(column, overflow="fold", max_width=34)
    shown, masks, layouts = [], [], []
    for number, photo in enumerate(photos, start=1):
        text = prompt_text(processor, prompt, 1)
        inputs = processor(images=photo, text=text, return_tensors="pt").to(model.device)
        seconds, size, output = compare_prefills(model, inputs, {"stock": OFF, "pruned": None}, repeats)
        mask = torch.cat(list(output.keep_masks))  # a family that counts by tile has several for one photo
        layout = layout_of(
            model.model.layouts(**image_arguments(model, inputs)),
            [len(part) for part in output.keep_masks],
            image_runs(model, inputs.input_ids),
        )
        if layout is None:
            console.print(
                f"Where the {len(mask)} visual tokens of photo {number} lie in it, no processor tells: no picture."
            )
        else:
            shown.append(photo)
            masks.append(mask)
            layouts.append(layout)
        for name, count, pruning in (("stock", len(mask), OFF), ("pruned", int(mask.sum()), None)):
            ids = model.generate(**inputs, pruning=pruning, max_new_tokens=max_new_tokens, do_sample=False)
            answer = processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0]
            table.add_row(
                f"{number} {name}",
                str(count),
                f"{size[name] / 2**20:.2f} MiB",
                f"{seconds[name] * 1e3:.1f} ms",
                printable(answer),
            )
        table.add_section()
    console.print(table)
    if shown:
        out.parent.mkdir(parents=True, exist_ok=True)
        plot_kept(shown, masks, layouts, out)
        console.print(f"What was kept: [bold]{out}[/bold]")


def printable(text: str) -> str:
    return "".join(letter if letter.isprintable() and letter != "\ufffd" else "·" for letter in text)


def main(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint of any family in docs/models.md: folder or Hub id.")
    ] = None,
    codebook: Annotated[
        str | None, typer.Option(help="Codebook: folder or Hub id; none for a saved RBL model.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A photo; repeat for more.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The question.")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Share of visual tokens to keep, in (0, 1].")] = None,
    threshold: Annotated[float | None, typer.Option(help="Keep tokens whose largest cosine is below this.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Timed prefills of each, interleaved.")] = 7,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("outputs/quickstart.png"),
) -> None:
    """Stock and pruned answers side by side."""
    try:
        run(model, codebook, image, prompt, keep_ratio, threshold, max_new_tokens, repeats, out)
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"quickstart: {first}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
