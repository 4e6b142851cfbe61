"""`RedundancyCodebook`: the prototypes of redundant visual tokens, and their Hub artifact (one safetensors, one
JSON)."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .merging import Choice, nearest_merging
from .names import check_folder, hub_words, why_no_codebook
from .pruning import PruningConfig, select_tokens
from .scorers import BUILT_IN, score_images, score_tokens


WEIGHTS_NAME = "codebook.safetensors"
CARD_NAME = "codebook.json"
FORMAT_VERSION = 1
MATRIX_ELEMENTS = 2**26  # of the cosine matrices of images that are scored together


class RedundancyCodebook(nn.Module):
    """Prototypes of redundant visual tokens in a language model's embedding space (arXiv 2503.20540, section on
    inference).

    The prototypes stay float32 whatever the rest of a model is cast to: scores are float32, and only the tokens carry
    the rounding of the model's dtype.

    Args:
        prototypes (`torch.Tensor` of shape `(n, d)`): floating point; finite, no zero rows.
        base_model (`str`, *optional*): Hub id of the model whose visual tokens they are.
        recommended_keep_ratio (`float`, *optional*): share to keep that this codebook was tuned for.
        recommended_threshold (`float`, *optional*): cosine threshold that it was tuned for.
        built_with (`dict`, *optional*): how it was made (recipe, data, source); JSON types only.

    Raises:
        ValueError: if `prototypes` is not such a matrix, in a sentence that says why.
    """

    prototypes: torch.Tensor
    unit_prototypes: torch.Tensor

    def __init__(
        self,
        prototypes: torch.Tensor,
        base_model: str | None = None,
        recommended_keep_ratio: float | None = None,
        recommended_threshold: float | None = None,
        built_with: dict[str, Any] | None = None,
    ):
        super().__init__()
        _check_prototypes(prototypes)
        if recommended_keep_ratio is not None:
            PruningConfig(keep_ratio=recommended_keep_ratio)  # raises for a value out of range
        if recommended_threshold is not None:
            PruningConfig(threshold=recommended_threshold)
        self.base_model = base_model
        self.recommended_keep_ratio = recommended_keep_ratio
        self.recommended_threshold = recommended_threshold
        self.built_with = built_with or {}
        self.register_buffer("prototypes", prototypes.detach().to(torch.float32, copy=True).contiguous())
        self.register_buffer("unit_prototypes", torch.empty(0), persistent=False)
        self.normalise()

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.normalise()

    @classmethod
    def uninitialised(cls, num_prototypes: int, width: int, metadata: dict | None = None) -> RedundancyCodebook:
        """A codebook to load weights into. It holds NaN until then, and `score` raises."""
        codebook = cls.__new__(cls)
        with torch.device("cpu"):
            cls.__init__(codebook, torch.ones(num_prototypes, width), **(metadata or {}))
        device = torch.empty(0).device  # `meta` while transformers builds a model to load
        codebook.prototypes = torch.full((num_prototypes, width), torch.nan, dtype=torch.float32, device=device)
        codebook.normalise()
        return codebook

    @property
    def recommended_pruning(self) -> PruningConfig | None:
        """The setting it was tuned for, its keep ratio first (counts known in advance); None if there is none."""
        if self.recommended_keep_ratio is not None:
            return PruningConfig(keep_ratio=self.recommended_keep_ratio)
        return None if self.recommended_threshold is None else PruningConfig(threshold=self.recommended_threshold)

    def normalise(self) -> None:
        """Refresh the unit-length copy that scores use. Call it after changing `prototypes` in place."""
        self.unit_prototypes = nn.functional.normalize(self.prototypes, dim=-1)
        self.is_loaded = self.prototypes.device.type != "meta" and bool(self.prototypes.isfinite().all())

    def score(self, tokens: torch.Tensor, kind: str = "cosine", **inputs: Any) -> torch.Tensor:
        """How redundant each token is.

        Args:
            tokens (`torch.Tensor` of shape `(L, d)`): visual tokens of one image, any floating dtype.
            kind (`str`): a key of [`~transformers_rbl.models.scorers.SCORERS`].
            inputs: what a scorer needs beside tokens and prototypes (`seed`, `frame`, `cls_similarity`, `count`).

        Returns:
            `torch.FloatTensor` of shape `(L,)`, on the tokens' device; higher is more redundant.

        Raises:
            ValueError: for tokens of another width, and for a scorer that chooses tokens without scoring them.
        """
        inputs = {"seed": 0, "frame": 0, **inputs}
        scores = score_tokens(kind, tokens=tokens, unit_prototypes=self.unit_prototypes_for(tokens), **inputs)
        if isinstance(scores, Choice):
            raise ValueError(f"The scorer {kind!r} chooses tokens without scoring them: use keep_mask.")
        return scores

    def unit_prototypes_for(self, tokens: torch.Tensor) -> torch.Tensor:
        """The prototypes `(n, d)` of unit length, on the device of the tokens that are to be compared with them.

        Raises:
            ValueError: if the tokens are not `(L, d)`, or the prototypes were never loaded.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.prototypes.shape[1]:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} do not fit a codebook of width {self.prototypes.shape[1]}: "
                f"(L, {self.prototypes.shape[1]}) is expected."
            )
        if not self.is_loaded:
            raise ValueError("This codebook's prototypes were never loaded: the model was made from a config alone.")
        return self.unit_prototypes.to(tokens.device, non_blocking=True)

    def keep_mask(self, tokens: torch.Tensor, pruning: PruningConfig) -> torch.Tensor:
        """Which of one image's tokens `(L, d)` stay under `pruning`: `torch.BoolTensor` of shape `(L,)`."""
        return keep_mask(tokens, pruning, self)

    def without_duplicates(self) -> RedundancyCodebook:
        """The same codebook without exactly repeated rows (first ones stay, in order).

        Cosine scores stay the same; softmax scores, which count every prototype, do not.
        """
        _, group = self.prototypes.unique(dim=0, return_inverse=True)
        first = torch.full((int(group.max()) + 1,), len(group), device=group.device)
        first = first.scatter_reduce(0, group, torch.arange(len(group), device=group.device), "amin")
        rows = first.sort().values
        single = RedundancyCodebook(self.prototypes[rows], **copy.deepcopy(self.metadata()))
        if "image_ids" in (source := single.built_with.get("source", {})):
            source["image_ids"] = [source["image_ids"][row] for row in rows.tolist()]
        return single

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `codebook.safetensors` and `codebook.json` to a folder, made if missing."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"prototypes": self.prototypes.cpu()}, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one, and it names no file
            raise OSError(f"{folder / WEIGHTS_NAME} could not be written: {error}") from error
        count, width = self.prototypes.shape
        card = {"version": FORMAT_VERSION, "num_prototypes": count, "width": width, **self.metadata()}
        (folder / CARD_NAME).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> RedundancyCodebook:
        """Read a codebook from a folder or from the Hub. Only safetensors is read.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder that `save_pretrained` wrote, or a Hub id.
            revision, token, cache_dir, local_files_only, force_download: as in `huggingface_hub.hf_hub_download`.

        Raises:
            OSError: if a file is missing or cannot be read.
            ValueError: if its content is not a codebook; the message names the file.
        """
        name = str(pretrained_model_name_or_path)

        def find(filename: str) -> Path:
            if os.path.isdir(name):
                return Path(name, filename)
            try:
                return Path(
                    hf_hub_download(
                        name,
                        filename,
                        revision=revision,
                        token=token,
                        cache_dir=cache_dir,
                        local_files_only=local_files_only,
                        force_download=force_download,
                    )
                )
            except RemoteEntryNotFoundError as error:
                raise OSError(
                    f"{name} has no {filename}: a codebook's repository holds {CARD_NAME} and {WEIGHTS_NAME}. A "
                    "model's repository holds its codebook inside: load the model."
                ) from error
            except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
                raise OSError(hub_words(error, name if revision is None else f"{name} at {revision}")) from error

        if os.path.isfile(name):
            raise OSError(why_no_codebook(name))
        check_folder(pretrained_model_name_or_path, "a codebook", cache_dir, local_files_only)
        return cls._read(find(CARD_NAME), find(WEIGHTS_NAME))

    @classmethod
    def _read(cls, card_file: Path, weights_file: Path) -> RedundancyCodebook:
        for file in (card_file, weights_file):
            if not file.is_file():
                raise OSError(why_no_codebook(file.parent))
        try:
            card = json.loads(card_file.read_text(encoding="utf-8"))
            shape = (card.pop("num_prototypes"), card.pop("width"))
            version = card.pop("version")
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{card_file} is no codebook description ({error!r}); download or build it again."
            ) from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{card_file} has format version {version}, this library reads {FORMAT_VERSION}: upgrade it."
            )
        try:
            tensors = load_file(weights_file)
        except SafetensorError as error:
            raise ValueError(
                f"{weights_file} is truncated or no safetensors file ({error}); download it again."
            ) from error
        if set(tensors) != {"prototypes"} or tuple(tensors["prototypes"].shape) != shape:
            shapes = {key: tuple(value.shape) for key, value in tensors.items()}
            raise ValueError(
                f"{weights_file} holds {shapes}, but {card_file.name} announces prototypes of shape {shape}."
            )
        known = {"base_model", "recommended_keep_ratio", "recommended_threshold", "built_with"}
        if unknown := sorted(set(card) - known):
            raise ValueError(f"{card_file} has unknown field(s) {', '.join(unknown)}: written by a newer version?")
        try:
            return cls(tensors["prototypes"], **card)
        except ValueError as error:
            raise ValueError(f"{weights_file.parent} holds no valid codebook: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload codebook",
        license: str | None = None,
    ):
        """Upload the codebook to a model repository on the Hub, made if missing, with a card unless it has one.
        Arguments as in `HfApi.upload_folder`; `license` is for the card.

        Returns:
            `huggingface_hub.CommitInfo`.
        """
        return library("hub.push", "push_to_hub").push_codebook(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            license=license,
        )

    def metadata(self) -> dict[str, Any]:
        """What the codebook knows of itself: base model, recommended settings, how it was built. JSON types."""
        return {
            "base_model": self.base_model,
            "recommended_keep_ratio": self.recommended_keep_ratio,
            "recommended_threshold": self.recommended_threshold,
            "built_with": self.built_with,
        }

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RedundancyCodebook:
        """Follow a move to another device, but never a cast: `.to(bfloat16)` and back would change the prototypes."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        count, width = self.prototypes.shape
        return f"{count} prototypes of width {width}, base_model={self.base_model!r}"


def keep_mask(
    tokens: torch.Tensor,
    pruning: PruningConfig,
    codebook: RedundancyCodebook | None = None,
    cls_similarity: torch.Tensor | None = None,
    frame: int = 0,
    **inputs: torch.Tensor | None,
) -> torch.Tensor:
    """Which tokens of one image (or of one video frame) stay.

    Args:
        tokens (`torch.Tensor` of shape `(L, d)`): the scored tokens.
        pruning (`PruningConfig`): the settings.
        codebook ([`RedundancyCodebook`], *optional*): needed by the scorers that compare with prototypes.
        cls_similarity (`torch.Tensor` of shape `(L,)`, *optional*): needed by the scorers of that name.
        frame (`int`, defaults to 0): number of the frame in its video, for `score="random"`.
        inputs (`torch.Tensor`, *optional*): what else a scorer needs: `cls_attention`, `tower_keys`, `question`.

    Returns:
        `torch.BoolTensor` of shape `(L,)`.
    """
    image = {"tokens": tokens, "cls_similarity": cls_similarity, "frame": frame, **inputs}
    return choose([image], pruning, codebook)[0].kept


def choose(
    images: list[dict[str, Any]], pruning: PruningConfig, codebook: RedundancyCodebook | None = None
) -> list[Choice]:
    """Which tokens of images (or video frames) stay, and what becomes of the others.

    Args:
        images (`list[dict]`): of each its scored tokens, `"tokens"` `(L, d)`, `"frame"`, and what the scorer needs
            besides, see [`~transformers_rbl.models.scorers.SCORERS`]. Those of one size are scored together.
        pruning (`PruningConfig`): the settings.
        codebook ([`RedundancyCodebook`], *optional*): needed by the scorers that compare with prototypes.

    Returns:
        `list[Choice]`, one per image.
    """
    chosen: dict[int, Choice] = {}
    together: dict[Any, list[int]] = {}
    for index, image in enumerate(images):
        tokens = image["tokens"]
        if tokens.ndim != 2:
            raise ValueError(f"Tokens of one image are (L, d); got a tensor of shape {tuple(tokens.shape)}.")
        if not pruning.enabled or len(tokens) == 0:
            chosen[index] = Choice(torch.ones(len(tokens), dtype=torch.bool, device=tokens.device))
        else:
            shapes = [(name, v.shape, v.device) for name, v in image.items() if isinstance(v, torch.Tensor)]
            together.setdefault(tuple(shapes), []).append(index)
    for indices in together.values():
        tokens = images[indices[0]]["tokens"]
        own = {"seed": pruning.seed, "count": pruning.count_of(len(tokens))}
        if codebook is not None and pruning.needs_codebook:
            own["unit_prototypes"] = codebook.unit_prototypes_for(tokens)
        at_once = max(1, MATRIX_ELEMENTS // len(tokens) ** 2)
        for start in range(0, len(indices), at_once):
            group = indices[start : start + at_once]
            said = score_images(pruning.score, [{"frame": 0, **images[index], **own} for index in group])
            for index, scores in zip(group, said, strict=True):
                chosen[index] = _settled(images[index]["tokens"], scores, pruning)
    return [chosen[index] for index in range(len(images))]


def _settled(tokens: torch.Tensor, scores: torch.Tensor | Choice, pruning: PruningConfig) -> Choice:
    """The choice that scores amount to, and the merging that the settings ask for."""
    count = pruning.count_of(len(tokens))
    if pruning.score not in BUILT_IN:
        _check_said(scores, tokens, pruning.score, count)
    choice = scores if isinstance(scores, Choice) else Choice(select_tokens(scores, pruning))
    if count == len(tokens):
        return Choice(choice.kept)  # nothing to take in: keeping all is the stock model, by every rule
    if pruning.merge == "nearest":
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            choice = Choice(choice.kept, nearest_merging(tokens.detach().float(), choice.kept, count))
    return choice


def _check_said(said: Any, tokens: torch.Tensor, score: str, count: int | None) -> None:
    """Raise a `ValueError` for what a registered rule must not say of tokens `(L, d)`, of which `count` are to stay."""

    def check(what: str, tensor: Any, shape: tuple[int, ...], is_bool: bool = False) -> None:
        dtype = "bool" if is_bool else "float"
        if not isinstance(tensor, torch.Tensor):
            got = f"a {type(tensor).__name__}"
        elif tensor.shape != shape:
            got = f"a tensor of shape {tuple(tensor.shape)}"
        elif tensor.device != tokens.device:
            got = f"a tensor on {tensor.device}"
        elif not (tensor.dtype == torch.bool if is_bool else tensor.is_floating_point()):
            got = f"a tensor of {tensor.dtype}"
        else:
            return
        raise ValueError(
            f"score={score!r} gave {got} for {len(tokens)} tokens: {what} of shape {shape}, {dtype}, on "
            f"{tokens.device} is expected."
        )

    if not isinstance(said, Choice):
        return check("a score a token,", said, (len(tokens),))
    check("Choice.kept", said.kept, (len(tokens),), is_bool=True)
    if count is None:
        raise ValueError(
            f"score={score!r} returns a Choice: annotate it so, def rule(…) -> Choice, and give keep_ratio."
        )
    if (kept := int(said.kept.sum())) != count:
        raise ValueError(
            f"score={score!r} keeps {kept} of {len(tokens)} tokens where {count} are to stay: counts must be known in "
            "advance."
        )
    if said.weights is not None:
        check("Choice.weights", said.weights, (count, len(tokens)))


def library(module: str, what: str) -> ModuleType:
    """A module of the installed package that the files beside this one can do without.

    Raises:
        ImportError: where these files came with a checkpoint and the package is missing.
    """
    try:
        return importlib.import_module(f"transformers_rbl.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(f"{what} needs the package: pip install transformers_rbl.") from error


def _check_prototypes(prototypes: torch.Tensor) -> None:
    if not isinstance(prototypes, torch.Tensor) or prototypes.ndim != 2 or 0 in prototypes.shape:
        got = tuple(prototypes.shape) if isinstance(prototypes, torch.Tensor) else type(prototypes).__name__
        raise ValueError(f"A codebook is a tensor of prototypes (n, d), with n and d at least 1; got {got}.")
    if not prototypes.is_floating_point():
        raise ValueError(f"Prototypes must be floating point, got {prototypes.dtype}.")
    if bad := int((~prototypes.isfinite()).any(-1).sum()):
        raise ValueError(f"{bad} of {len(prototypes)} prototypes hold NaN or infinite values.")
    if bad := int((prototypes == 0).all(-1).sum()):
        raise ValueError(
            f"{bad} of {len(prototypes)} prototypes are zero, and a zero vector has no direction to compare with."
        )
