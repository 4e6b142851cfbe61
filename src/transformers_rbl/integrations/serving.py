"""What a serving engine must know before it has seen an image: which settings it can serve, and how many visual tokens
an image will leave. No engine is imported here."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from ..models.auto_rbl import family_class
from ..models.codebook import RedundancyCodebook, choose
from ..models.layout import VisualLayout
from ..models.pruning import PruningConfig
from ..models.seam import PIXELS


OFF = PruningConfig(enabled=False)


def served_pruning(config: PreTrainedConfig) -> PruningConfig:
    """The settings of a checkpoint, if counts of tokens are known from them before an image is encoded.

    Args:
        config (`PreTrainedConfig`): of a saved checkpoint of ours.

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
    if pruning.keep_positions and not family_class(config.model_type).headless.family.mrope:
        raise ValueError(
            f"keep_positions=True leaves gaps, and an engine numbers tokens one after the other: {override}."
        )
    if pruning.newlines == "row":
        raise ValueError(
            'newlines="row" keeps a number of row ends that depends on the image, and an engine must know it before '
            'it has encoded one: save the checkpoint with newlines="all" or "last", or '
            f"{override}, which keeps them all."
        )
    family = family_class(config.model_type).headless.family
    if pruning.tiles == "base" and family.tiled:
        raise ValueError(
            f'tiles="base" is not to be had with {family.model_type} models, whose tiles do not say which is the '
            f"thumbnail: {override}."
        )
    if pruning.tiles == "where_needed":
        raise ValueError(f'tiles="where_needed" encodes in two steps, and an engine in one: {override}.')
    if pruning.frames == "where_needed":
        raise ValueError(
            'frames="where_needed" keeps a number of visual tokens that depends on the video, and an engine must know '
            f"it before it has seen one: {override}."
        )
    if pruning.needs_of_tower:
        raise ValueError(
            f"score={pruning.score!r} needs {' and '.join(pruning.needs_of_tower)} of the vision tower (its [cls] "
            f"token, its attention), which engines do not hand out: {override}."
        )
    if pruning.needs_question:
        raise ValueError(
            f"score={pruning.score!r} reads the question, and an engine keeps an image's tokens for the questions that "
            f"follow: {override}."
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
    """Where the visual tokens of an image or video lie, by the code of the transformers model, before it is encoded.

    Args:
        config (`PreTrainedConfig`): of a checkpoint of ours; its model is made without weights.
    """

    def __init__(self, config: PreTrainedConfig):
        with torch.device("meta"):
            self._model = family_class(config.model_type).headless(config)
        self._has_tiles = hasattr(config, "image_grid_pinpoints")

    def __call__(self, height: int, width: int) -> VisualLayout:
        """Of an image of this size in pixels, in a family of square tiles."""
        side = self._model.config.vision_config.image_size
        pixels = torch.empty(1, 1, 3, side, side, device="meta")
        sizes = {"image_sizes": torch.tensor([[height, width]])} if self._has_tiles else {}
        return self._model.layouts(pixel_values=pixels, **sizes)[0]

    def of_grid(self, modality: str, grid: tuple[int, int, int]) -> VisualLayout:
        """Of an image or video of this many frames, rows and columns of patches, in a family of native resolution."""
        frames, rows, columns = grid
        pixels = torch.empty(frames * rows * columns, 0, device="meta")
        told = {PIXELS[modality]: pixels, f"{modality}_grid_thw": torch.tensor([grid])}
        return self._model.layouts(modality, **told)[0]

    def of_tiles(self, count: int) -> VisualLayout:
        """Of an image of which a family knows no more than how many tokens its tiles have together: they share one
        budget, as in transformers."""
        if self._model.family.apart is None:
            raise ValueError(f"The tiles of {self._model.family.model_type} images do not share a budget.")
        return self._model.family.layout_of_tiles(self._model.config, count)


def kept_of_image(
    tokens: torch.Tensor,
    layout: VisualLayout,
    pruning: PruningConfig,
    codebook: RedundancyCodebook | None,
    width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stays of one image's or video's encoded tokens.

    Args:
        tokens (`torch.Tensor` of shape `(L, d)`): row ends among them.
        layout ([`VisualLayout`]): where they lie.
        pruning (`PruningConfig`): the settings.
        codebook ([`RedundancyCodebook`], *optional*): needed by the scorers that compare with prototypes.
        width (`int`, *optional*): channels that are scored, by default all; further ones are other views of the same
            tokens (Qwen3-VL's deepstack).

    Returns:
        The tokens that stay `(kept, d)`, merged where the settings say so, and which they are, `torch.BoolTensor` of
        shape `(L,)`.

    Raises:
        ValueError: if tokens and layout differ in number.
    """
    if len(tokens) != len(layout):
        raise ValueError(
            f"The vision tower gave {len(tokens)} visual tokens where {len(layout)} were reckoned with: this engine "
            "packs an image otherwise than transformers does."
        )
    scored = tokens[layout.scored(pruning).to(tokens.device), :width]
    choices = choose(layout.parts(scored, pruning), pruning, codebook)
    mask = layout.mask(choices, pruning)
    return layout.stay(tokens, choices, mask, pruning), mask
