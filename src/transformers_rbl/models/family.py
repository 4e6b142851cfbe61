"""What a family of models does differently from the others: what a `Family` can say.

Most families say nothing: stock `get_image_features` returns one entry of visual tokens per image or tile, which is
scored and counted by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from .layout import BASE, PATCH, VisualLayout
from .pruning import PruningConfig
from .seam import PIXELS, TOKENS, TYPES, VIEWS, Call


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What a stock class answers wrongly, or not at all: keys of `Family.refuses`.
CHUNKS, UNTYPED, VIDEOS = "`prefill_chunk_size`", "no `token_type_ids`", "videos"
COPIES = "beams or `num_return_sequences` over several images of one prompt, or a video"
Arguments = dict[str, Any]  # of `get_image_features` or `get_video_features`, by their stock names


@dataclass(frozen=True)
class Family:
    """A family of models. The methods here are those of a family of which nothing special is known.

    Args:
        model_type (`str`): transformers' name of it.
        projector (`str`): the headless model's module that makes visual tokens, beside which the codebook sits.
        stacked (`bool`): stock `forward` reads one tensor of all images' tokens, not a list.
        units (`Callable`, *optional*): `(config, length)` gives the lengths of the images or tiles that stock joins in
            one entry of `pooler_output`.
        mrope (`bool`): positions say where a token lies in its image.
        apart (`int`, *optional*): this many marks stand between the tiles of an image in the prompt, and more between
            images, so that its tiles share its budget there. None where it does not tell.
        tile_length (`Callable`, *optional*): visual tokens of one tile, given the config.
        thumbnail (`int`): which tile of an image is the thumbnail, where there are several and the prompt tells.
        row_marks (`bool`): rows of an image end with a mark in text, which follows `newlines=`.
        tiled (`bool`): images come in tiles and nothing tells which is the thumbnail: `tiles="base"` is refused.
        video_as_image (`bool`): a video's placeholders are those of images, and token types tell which they are.
        refuses (`dict[str, str]`): what the stock class answers wrongly, and why; ours raises.
    """

    model_type: str
    projector: str = "multi_modal_projector"
    stacked: bool = False
    units: Callable[[PreTrainedConfig, int], list[int]] | None = None
    mrope: bool = False
    apart: int | None = None
    tile_length: Callable[[PreTrainedConfig], int] | None = None
    thumbnail: int = -1
    row_marks: bool = False
    tiled: bool = False
    video_as_image: bool = False
    refuses: dict[str, str] = field(default_factory=dict)

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout] | None:
        """Per image or video, before anything is encoded; None where a family knows its layout only afterwards."""
        return None

    def layouts_in_prompt(self, model: Any, modality: str, arguments: Arguments, runs: list[list[int]] | None
                          ) -> list[VisualLayout] | None:  # fmt: skip
        """Per image or video where the prompt tells which tiles are one image; `runs` as for `grouped`.

        Raises:
            ValueError: if nothing tells.
        """
        layouts = self.layouts(model, modality, arguments)
        if layouts is not None or self.tile_length is None:
            return layouts
        length, tiles = self.tile_length(model.config), len(arguments[PIXELS[modality]])
        images = next((run for run in runs or () if sum(run) == tiles * length), None)
        if images is None or any(image % length for image in images):
            raise ValueError(
                f"Only the prompt tells which tile of a {self.model_type} image is the thumbnail: tiles='base' needs "
                "forward or generate, and a prompt with a placeholder for every visual token."
            )
        return [self.layout_of_tiles(model.config, count) for count in images]

    def layout_of_tiles(self, config: PreTrainedConfig, count: int) -> VisualLayout:
        """Of an image whose tiles, which share its budget, have `count` tokens together."""
        if self.tile_length is None:
            return VisualLayout.of_patches(count)
        kinds = torch.full((count,), PATCH).split(self.tile_length(config))
        if len(kinds) > 1:
            kinds[self.thumbnail].fill_(BASE)
        return VisualLayout(torch.cat(kinds))

    def on_host(self, arguments: Arguments) -> Arguments:
        """The arguments, with those of which stock asks values behind the tower read before it."""
        return arguments

    def stopped(self, model: Any, arguments: Arguments) -> tuple[Any, Arguments]:
        """A view of the headless model whose tower runs no layer that the family does not read, and the arguments for
        it."""
        return model, arguments

    def tile_shares(self, model: Any, arguments: Arguments) -> list[torch.Tensor]:
        """Per image `(L, tiles)`: how much of each visual token comes from each tile, the thumbnail first."""
        raise NotImplementedError(f"{self.model_type} does not tell which tile a token comes from.")

    @property
    def has_tile_shares(self) -> bool:
        return type(self).tile_shares is not Family.tile_shares

    def frames(self, model: Any, arguments: Arguments) -> list[torch.Tensor]:
        """Per video `(frames, patches, values)`: its pixels, by what the tower encodes without looking at the rest of
        the video."""
        raise NotImplementedError(f"{self.model_type} does not encode a video's frames each by itself.")

    @property
    def has_frames(self) -> bool:
        return type(self).frames is not Family.frames

    def select_frames(self, model: Any, arguments: Arguments, indices: list[list[int]]) -> Arguments:
        """The arguments for these frames of each video alone; only families with `frames` are asked."""
        raise NotImplementedError(f"{self.model_type} does not encode a video's frames each by itself.")

    def encode(self, model: Any, modality: str, arguments: Arguments) -> Any:
        """Stock features, with a list of `(L, d)` tokens, one entry per image or video."""
        outputs = getattr(model.stock, f"get_{modality}_features")(model, **arguments, return_dict=True)
        for name in (TOKENS, *VIEWS):
            if outputs.get(name) is not None:
                views = [outputs[name]] if name == TOKENS else outputs[name]
                views = [self.split(model.config, list(view)) for view in views]
                outputs[name] = views[0] if name == TOKENS else views
        return outputs

    def split(self, config: PreTrainedConfig, entries: list[torch.Tensor]) -> list[torch.Tensor]:
        """Entries of `pooler_output` as images (or tiles, where a family cannot tell)."""
        if self.units is None:
            return entries
        return [part for entry in entries for part in entry.split(self.units(config, len(entry)))]

    def grouped(
        self,
        entries: list[torch.Tensor],
        runs: list[list[int]] | None,
        layouts: list[VisualLayout] | None = None,
    ) -> list[torch.Tensor]:
        """Tiles joined to images, by their layouts or by where they stand in the prompt.

        Args:
            entries (`list[torch.Tensor]`): `(L, d)` each.
            runs (`list[list[int]]`, *optional*): lengths of runs of placeholders, of the whole prompt and of what a
                cache does not hold; those that the entries fill are theirs.
            layouts (`list[VisualLayout]`, *optional*): of the images.
        """
        lengths, theirs = [len(entry) for entry in entries], None
        if layouts is not None:
            theirs = [len(layout) for layout in layouts] if len(layouts) < len(entries) else None
        elif self.apart is not None:
            theirs = next((run for run in runs or () if sum(run) == sum(lengths)), None)
        if theirs is None:
            return entries
        ends = set(accumulate(theirs))
        images: list[list[torch.Tensor]] = [[]]
        for entry, end in zip(entries, accumulate(lengths)):
            images[-1].append(entry)
            if end in ends:
                images.append([])
        return [torch.cat(tiles) for tiles in images if tiles]

    def must_encode(self, modality: str, arguments: Arguments) -> bool:
        """Whether stock cannot take these arguments as they are, pruned or not."""
        return False

    def encode_base(self, model: Any, arguments: Arguments, layouts: list[VisualLayout]) -> Any:
        """Features of the base images alone; only families with tiles are asked."""
        if self.tile_length is None:
            raise NotImplementedError(f"{self.model_type} has no base images.")
        pixels, length = arguments[PIXELS["image"]], self.tile_length(model.config)
        tiles = pixels.split([len(layout) // length for layout in layouts])
        thumbnails = torch.stack([image[self.thumbnail] for image in tiles])
        return self.encode(model, "image", {**arguments, PIXELS["image"]: thumbnails})

    def cls_similarity(
        self, model: Any, modality: str, outputs: Any, arguments: Arguments, base_alone: bool
    ) -> list[torch.Tensor]:
        """Per image `(L,)` float32: cosine of each visual token's vision feature with [cls]'s."""
        raise ValueError(
            "score='cls_similarity_low' and 'cls_similarity_high' need a vision tower with a [cls] token, and that of "
            f"{self.model_type} has none or does not hand it out: choose another score."
        )

    def tower_arguments(self, pruning: PruningConfig) -> Arguments:
        """What stock is asked for besides, so that [`~Family.tower_values`] finds what the rule needs."""
        return {}

    def tower_values(
        self, model: Any, modality: str, outputs: Any, arguments: Arguments, base_alone: bool, names: list[str]
    ) -> list[dict[str, torch.Tensor]]:
        """Per image what `names` say of the vision tower: `cls_attention` `(L,)`, `tower_keys` `(L, heads, h)`, in
        float32, see [`~transformers_rbl.models.scorers.SCORERS`]; row ends are 0."""
        raise ValueError(
            f"{' and '.join(names)} of the vision tower cannot be had with {self.model_type} models: its tokens are "
            "not one to one with visual tokens, or its layers are not known here. Choose another score."
        )

    def has_cls(self, model: Any) -> bool:
        """Whether the vision tower has a [cls] token."""
        return False

    def select(self, model: Any, modality: str, arguments: Arguments, indices: list[int]) -> Arguments | None:
        """The arguments for these images or videos alone; None if a family cannot take them apart."""
        return None

    def joined(self, modality: str, tokens: list[torch.Tensor]) -> Any:
        """Tokens as stock `forward` reads them."""
        return torch.cat(tokens)[None] if self.stacked else tokens

    def never_reads(self, config: PreTrainedConfig, key: str) -> bool:
        """Whether a weight is one that no forward pass reads."""
        return False

    def check_call(self, call: Call) -> None:
        """Refuse a prompt with images that the stock class would read in another way once it is pruned."""
        if VIDEOS in self.refuses and "video" in call.pixels:
            raise ValueError(f"Videos of {self.model_type} models cannot be pruned: {self.refuses[VIDEOS]}.")
        if UNTYPED in self.refuses and (call.pixels or call.features) and "token_type_ids" not in call.along:
            raise ValueError(
                f"token_type_ids is missing: {self.refuses[UNTYPED]}. Pass everything that the processor returns."
            )

    def check_generation(self, call: Call, chunked: bool, copies: int) -> None:
        """Refuse what the stock class generates wrongly.

        Args:
            call ([`Call`]): of `generate`.
            chunked (`bool`): whether the prefill is split.
            copies (`int`): beams, or sequences per prompt.
        """
        if chunked and CHUNKS in self.refuses:
            raise ValueError(f"Leave prefill_chunk_size out for {self.model_type} models: {self.refuses[CHUNKS]}.")
        if copies > 1 and COPIES in self.refuses and _several_images_or_video(call):
            raise ValueError(
                f"Beams and num_return_sequences need prompts of one image with {self.model_type} models: "
                f"{self.refuses[COPIES]}."
            )


def grid_side(config: PreTrainedConfig) -> int:
    """Patches along one side of a square image."""
    return config.vision_config.image_size // config.vision_config.patch_size


def _several_images_or_video(call: Call) -> bool:
    """Whether a prompt has more than one image, told by token types, or a video."""
    if "video" in call.pixels or "video" in call.features:
        return True
    grids, features, types = call.visual.get("image_grid_thw"), call.features.get("image"), call.along.get(TYPES)
    count = len(features[TOKENS]) if features is not None else 0 if grids is None else len(grids)
    return count > (len(call.prompt) if types is None else int((types == 1).any(-1).sum()))
