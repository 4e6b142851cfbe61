"""`rbl verify`: the library's contracts, checked on a user's own checkpoint and installation.

Whatever the pruned model says is held against the stock class, which here shares its weights, so that nothing is loaded
twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from ..models.auto_rbl import rbl_class
from ..models.codebook import RedundancyCodebook
from ..models.pruning import PruningConfig
from .contracts import CONTRACTS, LOADS, prefill_time
from .pictures import RANDOM_PROTOTYPES, codebook_of_picture, drawn_picture, open_picture
from .report import FAILED, MEASURED, PASSED, SKIPPED, Check, Report, first_line, versions
from .subject import OFF, Broken, Skipped, Subject, stock_twin


def verify_checkpoint(
    model: str | os.PathLike,
    codebook: str | os.PathLike | None = None,
    image: str | os.PathLike | None = None,
    keep_ratio: float = 0.2,
    device: str | None = None,
    dtype: str = "auto",
    score: str = "cosine",
    merge: str = "none",
    keep_positions: bool = False,
) -> Report:
    """Load a checkpoint once and check the contracts on it.

    Args:
        model (`str` or `os.PathLike`): stock or pruned checkpoint, folder or Hub id.
        codebook (`str` or `os.PathLike`, *optional*): folder or Hub id. Default: the checkpoint's own, and for a stock
            checkpoint some visual tokens of the picture.
        image (`str` or `os.PathLike`, *optional*): a picture's file; one is drawn without it.
        keep_ratio (`float`, defaults to 0.2): share of visual tokens to keep.
        device (`str`, *optional*): default a GPU if there is one.
        dtype (`str`, defaults to `"auto"`): as in `from_pretrained`.
        score, merge, keep_positions: see [`PruningConfig`].

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: for a keep ratio, codebook, image or architecture that does not fit.
    """
    name, pruning = (
        str(model),
        PruningConfig(keep_ratio=keep_ratio, score=score, merge=merge, keep_positions=keep_positions),
    )
    picture = drawn_picture() if image is None else open_picture(image)
    prototypes = None if codebook is None else RedundancyCodebook.from_pretrained(codebook)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = {
        "model": name,
        "codebook": str(codebook),
        "picture": "a drawn one" if image is None else str(image),
        "keep_ratio": str(keep_ratio),
        **({"score": score} if score != "cosine" else {}),
        **({"merge": merge} if merge != "none" else {}),
        **({"keep_positions": "True"} if keep_positions else {}),
    }
    pruned_class = rbl_class(name)
    processor = AutoProcessor.from_pretrained(name)
    try:
        loaded, loading_info = pruned_class.from_pretrained(name, pruning=OFF, dtype=dtype, output_loading_info=True)
    except ValueError as error:  # missing weights: the first contract, and nothing is left to check the others on
        checks = [Check(LOADS, FAILED, first_line(error))]
        checks += [Check(other, SKIPPED, "the checkpoint did not load") for other in CONTRACTS if other != LOADS]
        return Report(versions(device, dtype), settings, checks)

    loaded = loaded.eval().to(device)
    loaded.config.full_length_logits = False  # a matter of presentation, which the comparisons would have to undo
    if prototypes is not None:
        loaded.set_codebook(prototypes)
        made_for = f" (made for {prototypes.base_model})" if prototypes.base_model else ""
        settings["codebook"] = f"{codebook}{made_for}"
    elif loaded.codebook is not None:
        settings["codebook"] = "the checkpoint's own"
    else:
        loaded.set_codebook(codebook_of_picture(loaded, processor, picture))
        settings["codebook"] = f"{RANDOM_PROTOTYPES} random visual tokens of the picture"
    checks = verify(
        loaded,
        processor,
        picture,
        keep_ratio=pruning.keep_ratio,
        loading_info=loading_info,
        score=score,
        merge=merge,
        keep_positions=keep_positions,
    )
    return Report(versions(str(loaded.device), str(loaded.dtype)), settings, checks)


def verify(
    model: Any,
    processor: Any,
    image: Image.Image | None = None,
    *,
    keep_ratio: float | None = 0.2,
    loading_info: Mapping[str, Any] | None = None,
    score: str = "cosine",
    merge: str = "none",
    keep_positions: bool = False,
) -> list[Check]:
    """Check the contracts on a loaded model: about a dozen passes over a prompt, half of them over pruned ones.

    Args:
        model (`RBLGenerationMixin`): a full pruned model with a codebook, in eval mode, on one device. It is not
            changed; its own settings are not used.
        processor (`ProcessorMixin`): the checkpoint's.
        image (`PIL.Image.Image`, *optional*): the picture to ask about; one is drawn without it.
        keep_ratio (`float`, defaults to 0.2): share of visual tokens to keep.
        loading_info (`dict`, *optional*): what `from_pretrained(…, output_loading_info=True)` returned beside the
            model; without it that contract is skipped.
        score, merge, keep_positions: see [`PruningConfig`].

    Raises:
        ValueError: for a model of which the stock class cannot share the weights, or without codebook; for a score that
            it cannot prune by.
    """
    pruning = PruningConfig(keep_ratio=keep_ratio, score=score, merge=merge, keep_positions=keep_positions)
    _check_model(model)
    with torch.no_grad():
        picture = drawn_picture() if image is None else image
        subject = Subject(model, stock_twin(model), processor, picture, pruning, loading_info)
        if score != "cosine":
            _ = subject.output  # a rule that this model cannot prune by is refused here, and not once a contract
        return [_run(name, contract, subject) for name, contract in CONTRACTS.items()]


def _check_model(model: Any) -> None:
    if model.codebook is None:
        raise ValueError("This model has no codebook to prune with: call model.set_codebook(…) first.")
    if model.training:
        raise ValueError("Contracts hold in eval mode: call model.eval() first.")
    if getattr(model, "hf_quantizer", None) is not None or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            "The stock class has to share the model's weights: load it unquantised, on one device, without device_map."
        )
    if model.config.full_length_logits:
        raise ValueError("Logits are compared at kept positions: set model.config.full_length_logits = False first.")


def _run(name: str, contract: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(name, MEASURED if contract is prefill_time else PASSED, contract(subject))
    except Skipped as reason:
        return Check(name, SKIPPED, str(reason))
    except Broken as finding:
        return Check(name, FAILED, str(finding))
    except Exception as error:  # a check that cannot be made is a finding, and the others go on
        return Check(name, FAILED, f"{type(error).__name__}: {first_line(error)}")
