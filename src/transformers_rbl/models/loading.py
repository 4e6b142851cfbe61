"""A checkpoint loads completely or raises, with its codebook and settings, and is saved with them."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .codebook import RedundancyCodebook, library
from .family import Family
from .names import check_folder
from .pruning import PruningConfig
from .scorers import registered_at


logger = logging.get_logger(__name__)

_alone: ContextVar[frozenset[int]] = ContextVar("alone", default=frozenset())


@contextmanager
def stock_alone(model: Any) -> Iterator[None]:
    """While this runs, whatever stock code of the model calls on it is stock's too: off is off all the way down, and an
    encoder that calls another (Qwen3-VL's does, for videos) gets what it expects. A context variable is of one thread,
    and nothing is written on the module."""
    token = _alone.set(_alone.get() | {id(model.base_model)})
    try:
        yield
    finally:
        _alone.reset(token)


Mixed: Any = object  # which transformers class the mixins meet is known when a family's classes are made


class LoadingMixin(Mixed):
    """What headless and full pruned models share beside `forward`: loading, settings, saving."""

    stock: Any  # the class that this one prunes
    full: Any
    family: Family

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        codebook: RedundancyCodebook | torch.Tensor | str | os.PathLike | None = None,
        keep_ratio: float | None = None,
        threshold: float | None = None,
        pruning: PruningConfig | dict | None = None,
        check_base: bool = True,
        codebook_revision: str | None = None,
        **kwargs: Any,
    ):
        """Load a stock checkpoint with a codebook, or a checkpoint that this class saved.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): as in transformers.
            codebook ([`RedundancyCodebook`], `torch.Tensor`, `str` or `os.PathLike`, *optional*): the object, its
                prototypes `(n, d)`, a folder or a Hub id; replaces the checkpoint's own.
            keep_ratio, threshold (`float`, *optional*): one of them, in place of all saved settings. Without either, a
                new codebook's recommended setting is used (its keep ratio first). With neither setting nor codebook,
                pruning is off, which a warning says once.
            pruning ([`PruningConfig`] or `dict`, *optional*): all settings at once, in place of
                `keep_ratio`/`threshold`.
            check_base (`bool`, defaults to `True`): refuse a codebook made for another base model.
            codebook_revision (`str`, *optional*): branch, tag or commit of the codebook's repository.
            kwargs: everything that transformers' `from_pretrained` takes; `token`, `cache_dir`, `local_files_only` and
                `force_download` hold for the codebook too.

        Raises:
            OSError: if there is no such checkpoint or codebook.
            ValueError: for settings or a codebook that do not fit, and if the checkpoint lacks a weight that the
                forward pass reads (transformers would fill it with random numbers).
        """
        if pruning is None and (keep_ratio is not None or threshold is not None):
            pruning = PruningConfig(keep_ratio=keep_ratio, threshold=threshold)
        elif keep_ratio is not None or threshold is not None:
            raise ValueError("Give either pruning=PruningConfig(…) or keep_ratio=/threshold=, not both.")
        if pretrained_model_name_or_path is not None:
            known = {name: kwargs[name] for name in ("cache_dir", "local_files_only") if name in kwargs}
            check_folder(pretrained_model_name_or_path, "a checkpoint", **known)
        if isinstance(codebook, torch.Tensor):
            codebook = RedundancyCodebook(codebook)
        if codebook is not None and not isinstance(codebook, RedundancyCodebook):
            names = ("token", "cache_dir", "local_files_only", "force_download")
            shared = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            codebook = RedundancyCodebook.from_pretrained(codebook, revision=codebook_revision, **shared)
        elif codebook_revision is not None:
            raise ValueError("codebook_revision belongs to a codebook from the Hub: give codebook= its id.")
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(config, cls.config_class):
            kwargs["config"] = cls.config_class.from_dict(
                {**config.to_dict(), "model_type": cls.config_class.model_type}
            )
        with_info = kwargs.pop("output_loading_info", False)

        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"A weights file of {pretrained_model_name_or_path} is truncated or no safetensors file ({error}): "
                "download it again, with force_download=True if it is from the Hub."
            ) from error
        missing = missing_weights(model, info["missing_keys"])
        if codebook is not None:  # it takes the place of one in the checkpoint
            missing = [key for key in missing if not key.endswith("codebook.prototypes")]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold every weight of {cls.__name__}; transformers has left "
                f"random numbers in: {', '.join(missing)}."
            )
        model._settle(codebook, pruning, check_base)
        return (model, info) if with_info else model

    def _settle(
        self, codebook: RedundancyCodebook | None, pruning: PruningConfig | dict | None, check_base: bool
    ) -> None:
        """After loading: give the codebook its place, the config its settings, and refuse what does not fit."""
        name = self.config.name_or_path
        if self.config.base_model is None and self.config.num_prototypes is None and name and not os.path.isdir(name):
            self.config.base_model = name  # a stock checkpoint from the Hub
        if codebook is not None:
            if check_base:
                check_base_model(codebook, self.config.base_model)
            if pruning is None and self.config.pruning is None:
                pruning = codebook.recommended_pruning
                if pruning is None:
                    logger.warning(
                        "The codebook recommends no setting and none was given, so pruning stays off: pass "
                        "keep_ratio=, threshold= or pruning=, here or per call."
                    )
        elif self.base_model.codebook is None and pruning is None and self.config.pruning is None:
            logger.warning_once(
                "This model has neither a codebook nor a setting, so pruning is off and it answers as the stock model "
                "does: pass codebook= and keep_ratio=, or pruning=, here or per call."
            )
        if (codebook := codebook or resident(self.base_model.codebook)) is not None:
            self.set_codebook(codebook)
        if pruning is not None:
            self.pruning = pruning
        try:
            _ = self.pruning  # saved settings that are broken end here,
        except ValueError as error:
            raise ValueError(f"config.json of {name}: {error} Or give pruning= here.") from error
        self.active_pruning(None)  # and those that lack their codebook

    @property
    def pruning(self) -> PruningConfig | None:
        """The settings in force, None if there are none. Assign a [`PruningConfig`] (or None) to change them."""
        return None if self.config.pruning is None else PruningConfig.from_dict(self.config.pruning)

    @pruning.setter
    def pruning(self, settings: PruningConfig | dict | None) -> None:
        self.config.pruning = None if settings is None else PruningConfig.from_dict(settings).to_dict()

    def active_pruning(self, pruning: PruningConfig | dict | None = None) -> PruningConfig | None:
        """The settings that a call with `pruning=` runs under, None if pruning is off.

        Raises:
            ValueError: for wrong settings, or a score that needs a codebook where the model has none.
        """
        pruning = self.pruning if pruning is None else PruningConfig.from_dict(pruning)
        if pruning is None or not pruning.enabled or id(self.base_model) in _alone.get():
            return None
        if pruning.tiles == "base" and self.family.tiled:
            raise ValueError(
                f"tiles='base' is not to be had with {self.family.model_type} models: nothing tells which of an image's"
                " tiles is the thumbnail. Leave it at 'all', or switch tiles off in the processor."
            )
        if pruning.tiles == "where_needed" and not self.family.has_tile_shares:
            raise ValueError(
                f"tiles='where_needed' is not to be had with {self.family.model_type} models: it is for those of "
                "LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision. Leave it at 'all'."
            )
        if pruning.frames == "where_needed" and not (
            self.family.has_frames and hasattr(self.base_model, "get_video_features")
        ):
            raise ValueError(
                f"frames='where_needed' is not to be had with {self.family.model_type} models: it is for families with "
                "a vision tower that encodes each frame of a video by itself, and says where its tokens lie: "
                "LLaVA-OneVision, LLaVA-NeXT-Video, Qwen-VL and GLM-4V. Leave it at 'all'."
            )
        if self.base_model.codebook is None and pruning.needs_codebook:
            raise ValueError(
                "Pruning is on, but this model has no codebook: load it with codebook=…, call model.set_codebook(…), "
                "or switch pruning off with PruningConfig(enabled=False)."
            )
        return pruning

    def check_pruning(self, pruning: PruningConfig | dict) -> None:
        """Raise a `ValueError` for settings that this model cannot prune with."""
        self.active_pruning(pruning)

    def set_codebook(self, codebook: RedundancyCodebook) -> None:
        """Prune with a copy of this codebook from now on; `save_pretrained` will include it.

        Raises:
            ValueError: if its width is not the language model's.
        """
        width, expected = codebook.prototypes.shape[1], self.config.get_text_config().hidden_size
        if width != expected:
            made_for = f" (made for {codebook.base_model})" if codebook.base_model else ""
            raise ValueError(
                f"The codebook's prototypes have width {width}{made_for}, but this language model's embeddings have "
                f"width {expected}: it belongs to another model."
            )
        if codebook is not self.base_model.codebook:  # two models must not share, and move, one object
            codebook = copy.deepcopy(codebook)
        device = next(self.base_model.get_submodule(self.family.projector).parameters()).device
        self.base_model.register_module("codebook", codebook if device.type == "meta" else codebook.to(device))
        codebook.normalise()
        self.config.num_prototypes, self.config.codebook = len(codebook.prototypes), codebook.metadata()

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, with_code: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers: weights, codebook and settings, and a card where the folder has none.

        Args:
            save_directory (`str` or `os.PathLike`): made if missing.
            with_code (`bool`, defaults to `False`): write this library's inference files too, so that a machine without
                it loads the model with `trust_remote_code=True`.
            kwargs: everything that transformers' `save_pretrained` takes.

        Raises:
            ValueError: with `with_code`, for settings whose score is a registered one: the code has no such rule.
        """
        if with_code:
            self._refuse_rules_left_behind()
            self.config.auto_map = auto_map(self.full)
        elif not self.is_remote_code() and getattr(self.config, "auto_map", None):
            del self.config.auto_map  # of the checkpoint it was loaded from; this one has no code
        super().save_pretrained(save_directory, *args, **kwargs)
        if with_code:
            copy_code(self.full, save_directory)
        if kwargs.get("is_main_process", True) and not kwargs.get("push_to_hub", False):  # the Hub may have a card
            self._write_card(Path(save_directory), with_code)

    def _refuse_rules_left_behind(self) -> None:
        settings = self.pruning
        if settings is not None and (origin := registered_at(settings.score)) is not None:
            raise ValueError(
                f"with_code=True writes this library's files, and score={settings.score!r} is yours ({origin}): where "
                "they alone are, nothing could register it. Save without code, or with another score in pruning."
            )

    def _write_card(self, folder: Path, with_code: bool) -> None:
        """Whoever finds the folder learns from it which import its Auto classes need."""
        readme = folder / "README.md"
        if not isinstance(self, self.full) or readme.exists():
            return
        try:
            cards = library("hub.cards", "The card")
        except ImportError:
            return  # these files came with a checkpoint, whose own card said it
        cards.model_card(self, f"path/to/{folder.resolve().name}", with_code=with_code).save(readme)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: Any = None,
        with_code: bool = False,
        license: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Upload weights, codebook and settings to one repository, made if missing, with a card unless it has one.

        Args:
            repo_id (`str`): e.g. `"org/llava-next-rbl"`.
            processor (`ProcessorMixin`, *optional*): uploaded with it, so that `pipeline` works on the repository.
            with_code (`bool`, defaults to `False`): see [`~LoadingMixin.save_pretrained`].
            license (`str`, *optional*): for the card; that of the base model, as a rule.
            tags (`list[str]`, *optional*): for the card, beside its own.
            others: as in transformers.

        Returns:
            `huggingface_hub.CommitInfo`.
        """
        return library("hub.push", "push_to_hub").push_model(
            self,
            repo_id,
            processor=processor,
            with_code=with_code,
            license=license,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            max_shard_size=max_shard_size,
            tags=tags,
        )


def inherit_key_conversion(model_class: Any, stock_class: Any, headless: bool) -> None:
    """Read a stock checkpoint's keys as the stock class does.

    transformers looks conversions up by class name, then by model type, and has none for ours: the keys of a Hub
    checkpoint (`language_model.model.*`) would match nothing and leave random weights behind.
    """
    stock_type, model_type = stock_class.config_class.model_type, model_class.config_class.model_type
    for ours, stock in ((model_class.__name__, stock_class.__name__), (model_type, stock_type)):
        mapping = get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            if headless or ours == model_type:  # stock's prefixes know of no codebook
                mapping = [WeightRenaming(r"^model\.codebook\.", "codebook."), *mapping]
            # The package and its copy as remote code may meet in one process: the second registration replaces the
            # first.
            register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def missing_weights(model: LoadingMixin, missing_keys: set[str] | list[str]) -> list[str]:
    """Of the weights that loading reported missing, those that a forward pass reads."""
    missing = [key for key in sorted(missing_keys) if not model.family.never_reads(model.config, key)]
    if missing and getattr(model, "hf_quantizer", None) is not None:
        # A quantised model has keys (scales, states) that no checkpoint of the plain one holds.
        with torch.device("meta"):
            plain = type(model)(model.config).state_dict()
        missing = [key for key in missing if key in plain]
    return missing


def resident(codebook: RedundancyCodebook | None) -> RedundancyCodebook | None:
    """The codebook itself, or the one that a `device_map` sent to disk (`offload_buffers=True`) back in memory: it is
    small, and every image reads it."""
    if codebook is None or codebook.prototypes.device.type != "meta":
        return codebook
    hook = getattr(codebook, "_hf_hook", None)  # of accelerate
    maps = [getattr(part, "weights_map", None) for part in getattr(hook, "hooks", [hook])]
    on_disk = next((weights for weights in maps if weights is not None), None)
    return codebook if on_disk is None else RedundancyCodebook(on_disk["prototypes"], **codebook.metadata())


def check_base_model(codebook: RedundancyCodebook, base_model: str | None) -> None:
    """Raise if a codebook says that it was made for another base model."""
    if codebook.base_model and base_model and codebook.base_model != base_model:
        raise ValueError(
            f"This codebook was made for {codebook.base_model}, but the model is {base_model}. Pass check_base=False "
            "if their visual tokens are the same."
        )


def auto_map(full: Any) -> dict[str, str]:
    """Which class of the code files each Auto class loads, for a config's `auto_map`."""
    config, headless = full.config_class, full.headless
    places = {
        "AutoConfig": config,
        "AutoModel": headless,
        "AutoModelForImageTextToText": full,
        "AutoModelForMultimodalLM": full,
    }
    return {auto: f"{made.__module__.rpartition('.')[2]}.{made.__name__}" for auto, made in places.items()}


def copy_code(full: Any, folder: str | os.PathLike) -> None:
    """Copy the files that load a pruned model, those that `full`'s own imports, into a checkpoint's folder."""
    module = str(sys.modules[full.__module__].__file__)
    for file in (module, *get_relative_import_files(module)):
        shutil.copyfile(file, Path(folder, Path(file).name))
