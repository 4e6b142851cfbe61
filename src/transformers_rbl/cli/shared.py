"""What the commands share: the app they join, how one ends on bad input, options, checks and loading."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from safetensors import SafetensorError


if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

app = typer.Typer(help="Codebooks of redundant visual tokens for vision-language models.", no_args_is_help=True)

AnyModel = Annotated[str, typer.Option(help="Stock or pruned checkpoint: folder or Hub id.")]
Codebook = Annotated[str | None, typer.Option(help="Folder or Hub id; none for a pruned checkpoint.")]
Device = Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
ImageColumn = Annotated[str, typer.Option(help="Of a dataset, the column with images.")]
RecommendedRatio = Annotated[float | None, typer.Option(help="Keep ratio to recommend, in (0, 1].")]
RecommendedThreshold = Annotated[float | None, typer.Option(help="Cosine threshold to recommend.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that an earlier run has written.")]
Split = Annotated[str, typer.Option(help="Of a dataset.")]
Streaming = Annotated[bool, typer.Option(help="Read a Hub dataset without downloading it first.")]
Suffix = Annotated[str, typer.Option(help="Added to every question.")]

# What a command that Ctrl-C stops has to say, where it isn't that nothing was written.
GOES_ON = {
    "build": "Images that were probed stay so: run the same command to go on.",
    "demo": "The page is closed.",
    "publish": "What was uploaded stays: run the same command to go on.",
}
KEEP_RATIOS = (0.5, 0.33, 0.22, 0.15, 0.1, 0.05)  # tried unless others are given


def one_sentence(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Bad input ends a command with one sentence and status 2, not with a traceback; Ctrl-C with one and status 130."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            print(f"\nrbl: stopped. {GOES_ON.get(command.__name__, 'Nothing was written.')}", file=sys.stderr)
            raise typer.Exit(130) from None
        except (ValueError, OSError, SafetensorError) as error:
            lines = str(error).strip().splitlines()
            print(f"rbl: {lines[0] if lines else type(error).__name__}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run


def need_matplotlib() -> None:
    """Before hours of work, not after.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("The report's pictures need matplotlib: pip install transformers_rbl[build].")


def check_setting(keep_ratio: float | None, threshold: float | None) -> None:
    """A setting to recommend, before hours of work.

    Raises:
        ValueError: for one out of range; the message names the option.
    """
    from ..models.pruning import PruningConfig

    for option, setting in (("keep-ratio", keep_ratio), ("threshold", threshold)):
        if setting is not None:
            try:
                PruningConfig.from_dict({option.replace("-", "_"): setting})
            except ValueError as error:
                raise ValueError(f"--{option}: {error}") from None


def check_metrics(names: list[str]) -> None:
    """Metrics are those of `METRICS`.

    Raises:
        ValueError: for any other name.
    """
    from ..evaluation.metrics import METRICS

    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"--metric is one of {', '.join(METRICS)}, not {', '.join(unknown)}.")


def check_model(model: str | None) -> None:
    """There is a checkpoint of that name, before torch is imported, which takes seconds.

    Raises:
        OSError: if there is none, or nobody can be asked.
    """
    from ..models.names import check_checkpoint

    if model is not None:
        check_checkpoint(model)


def check_placement(dtype: str, device: str | None) -> None:
    """A model can be put there, in this type.

    Raises:
        ValueError: for an unknown type, or a device that is not here.
    """
    import torch

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is auto, float32, bfloat16 or float16, not {dtype}.")
    if device is None:
        return
    try:
        torch.zeros(1, device=device).cpu()  # meta's tensors hold nothing
    except (RuntimeError, AssertionError, ImportError) as error:  # no such name, or no such device here
        here = devices()
        why = (
            f" ({str(error).splitlines()[0]})" if {device, f"{device}:0"} & set(here) else ""
        )  # one that is full, or in use
        raise ValueError(f"--device {device} cannot be had{why}: this machine has {', '.join(here)}.") from error


def devices() -> list[str]:
    """What a model can be put on here, by torch's names."""
    import torch

    gpus = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}
    counts = {name: gpu.device_count() for name, gpu in gpus.items()}
    return ["cpu", *(f"{name}:{number}" for name, count in counts.items() for number in range(count))]


def load_stock(model: str, dtype: str, device: str, device_map: str | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A stock model in eval mode, and its processor.

    Args:
        model (`str`): folder or Hub id.
        dtype (`str`): as in `from_pretrained`.
        device (`str`): where it goes, unless `device_map` spreads it.
        device_map (`str`, *optional*): as in `from_pretrained`.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: for an unknown type, or a device that is not here.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..models.names import check_checkpoint

    check_placement(dtype, device)
    check_checkpoint(model)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, device_map=device_map).eval()
    if device_map is None:
        loaded = loaded.to(device)
    return loaded, AutoProcessor.from_pretrained(model)


def load_pruned(model: str, codebook: str | None, dtype: str, device: str | None) -> tuple[Any, ProcessorMixin]:
    """A pruned model in eval mode with pruning off, and its processor.

    Args:
        model (`str`): folder or Hub id, stock or pruned.
        codebook (`str`, *optional*): folder or Hub id; default the checkpoint's.
        dtype (`str`): as in `from_pretrained`.
        device (`str`, *optional*): default a GPU if there is one.

    Raises:
        OSError: if there is no such checkpoint or codebook.
        ValueError: for a checkpoint of an architecture that cannot be pruned, an unknown type, or a device that is not
            here.
    """
    import torch
    from transformers import AutoProcessor

    from ..models.auto_rbl import rbl_class

    check_placement(dtype, device)
    loaded = rbl_class(model).from_pretrained(model, codebook=codebook, pruning={"enabled": False}, dtype=dtype).eval()
    loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loaded, AutoProcessor.from_pretrained(model)
