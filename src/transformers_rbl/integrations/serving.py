"""What a serving engine must know before it has seen an image: which settings it can serve, and how many visual tokens
an image will leave. No engine is imported here."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from ..models.auto_rbl import family_class
from ..models.codebook import RedundancyCodebook
from ..models.layout import VisualLayout
from ..models.pruning import PruningConfig


OFF = PruningConfig(enabled=False)


def served_pruning(config: PreTrainedConfig) -> PruningConfig:
    """The settings of a checkpoint, if counts of tokens are known from them before an image is encoded.

    Args:
        config (`LlavaRBLConfig`, `LlavaNextRBLConfig` or `LlavaOnevisionRBLConfig`): a saved checkpoint's.

    Returns:
        [`PruningConfig`], switched off if the checkpoint has none.

    Raises:
        ValueError: for settings that an engine cannot serve, or a codebook that is missing.
    """
    pruning = OFF if config.pruning is None else PruningConfig.from_dict(config.pruning)
    if config.vision_config.model_type == "pixtral":
        raise ValueError("Checkpoints with a Pixtral vision tower are not served with pruning: use transformers.")
    if not pruning.enabled:
        return pruning
    override = """start the engine with --hf-overrides '{"pruning": {"keep_ratio": 0.15}}'"""
    if pruning.keep_ratio is None:
        raise ValueError(
            f"threshold={pruning.threshold} keeps a number of visual tokens that depends on the image, and an engine "
            "must know it before it has encoded one. `rbl calibrate --data … --share 0.97` finds a keep ratio that "
            f"keeps the accuracy; save it in the checkpoint, or {override}. Or choose the tokens outside: switch "
            "pruning off and send image_embeds (docs/guide/serving.md)."
        )
    if pruning.newlines == "row":
        raise ValueError(
            'newlines="row" keeps a number of row ends that depends on the image, and an engine must know it before '
            'it has encoded one: save the checkpoint with newlines="all" or "last", or '
            f"{override}, which keeps them all."
        )
    if pruning.needs_of_tower:
        raise ValueError(
            f"score={pruning.score!r} needs {' and '.join(pruning.needs_of_tower)} of the vision tower (its [cls] token, "
            f"its attention), which engines do not hand out: {override}."
        )
    if pruning.needs_question:
        raise ValueError(
            f"score={pruning.score!r} reads the question, and an engine keeps an image's tokens for the questions that "
            f"follow: {override}."
        )
    if pruning.merges:
        raise ValueError(
            f"score={pruning.score!r} with merge={pruning.merge!r} changes the tokens that stay, and this engine's "
            f"plugin does not: {override}."
        )
    if pruning.needs_codebook and config.num_prototypes is None:
        raise ValueError(
            "The checkpoint prunes but holds no codebook: load it with codebook=… in transformers and save it again "
            "(docs/guide/serving.md)."
        )
    return pruning


def with_keep_ratio(pruning: PruningConfig, keep_ratio: float | None) -> PruningConfig:
    """The settings of one request: a smaller share than the checkpoint's, never a larger one, since the engine has
    reserved memory for that."""
    if keep_ratio is None:
        return pruning
    PruningConfig(keep_ratio=keep_ratio)  # raises for anything that is no ratio
    if not pruning.enabled:
        raise ValueError("keep_ratio was given for one request, but this checkpoint does not prune.")
    if pruning.keep_ratio is None or keep_ratio > pruning.keep_ratio:
        raise ValueError(
            f"keep_ratio={keep_ratio} of this request is above the {pruning.keep_ratio} that the engine has "
            "reserved memory for: start it with a larger one in --hf-overrides."
        )
    return replace(pruning, keep_ratio=keep_ratio)


class ImageLayouts:
    """Where the visual tokens of an image lie, by the packing code of the transformers model.

    Args:
        config (`LlavaRBLConfig`, `LlavaNextRBLConfig` or `LlavaOnevisionRBLConfig`): its model is made without weights.
    """

    def __init__(self, config: PreTrainedConfig):
        with torch.device("meta"):
            self._model = family_class(config.model_type).headless(config)
        tower = config.vision_config
        self._pixels = torch.empty(1, 1, 3, tower.image_size, tower.image_size, device="meta")
        self._has_tiles = hasattr(config, "image_grid_pinpoints")

    def __call__(self, height: int, width: int) -> VisualLayout:
        """The layout of an image of this size in pixels."""
        sizes = {"image_sizes": torch.tensor([[height, width]])} if self._has_tiles else {}
        return self._model.layouts(pixel_values=self._pixels, **sizes)[0]


def keep_of_image(
    tokens: torch.Tensor, layout: VisualLayout, pruning: PruningConfig, codebook: RedundancyCodebook | None
) -> torch.Tensor:
    """Which of one image's encoded tokens `(L, d)`, row ends among them, stay: `torch.BoolTensor` of shape `(L,)`.

    Raises:
        ValueError: if tokens and layout differ in number.
    """
    if len(tokens) != len(layout):
        raise ValueError(
            f"The vision tower gave {len(tokens)} visual tokens where {len(layout)} were reckoned with: this engine "
            "packs an image otherwise than transformers does."
        )
    return layout.keep(tokens[layout.scored(pruning).to(tokens.device)], pruning, codebook)
