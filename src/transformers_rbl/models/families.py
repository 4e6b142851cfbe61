"""What a family of models does differently, as data and small functions: the only readers of family config names.

Most families need nothing: stock `get_image_features` returns one entry of visual tokens per image or tile, which is
scored and counted by itself. `FAMILIES` is the list of families that this library is tested with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .layout import BASE, NEWLINE, PATCH, VisualLayout
from .seam import PIXELS, TOKENS, TYPES, VIEWS, Call


# What a stock class answers wrongly, or not at all: keys of `Family.refuses`.
CHUNKS, UNTYPED = "`prefill_chunk_size`", "no `token_type_ids`"
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
        runs (`bool`): the tiles of an image stand side by side in the prompt, so that they share its budget there.
        video_as_image (`bool`): a video's placeholders are those of images, and token types tell which they are.
        refuses (`dict[str, str]`): what the stock class answers wrongly, and why; ours raises.
    """

    model_type: str
    projector: str = "multi_modal_projector"
    stacked: bool = False
    units: Callable[[PreTrainedConfig, int], list[int]] | None = None
    mrope: bool = False
    runs: bool = False
    video_as_image: bool = False
    refuses: dict[str, str] = field(default_factory=dict)

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout] | None:
        """Per image or video, before anything is encoded; None where a family knows its layout only afterwards."""
        return None

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

    def grouped(self, entries: list[torch.Tensor], runs: list[list[int]] | None) -> list[torch.Tensor]:
        """Tiles that stand side by side in the prompt, joined to images. Each of `runs` is the lengths of runs of
        placeholders (of the whole prompt, of what a cache does not hold); those that the entries fill are theirs."""
        lengths = [len(entry) for entry in entries]
        theirs = next((run for run in runs or () if sum(run) == sum(lengths)), None)
        if not self.runs or theirs is None:
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

    def encode_base(self, model: Any, arguments: Arguments) -> Any:
        """Features of the base images alone; only families with tiles are asked."""
        raise NotImplementedError(f"{self.model_type} has no base images.")

    def cls_similarity(
        self, model: Any, modality: str, outputs: Any, arguments: Arguments, base_alone: bool
    ) -> list[torch.Tensor]:
        """Per image `(L,)` float32: cosine of each visual token's vision feature with [cls]'s."""
        raise ValueError(
            "score='cls_similarity_low' and 'cls_similarity_high' need a vision tower with a [cls] token, and that of "
            f"{self.model_type} has none or does not hand it out: choose another score."
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


@dataclass(frozen=True)
class LlavaFamily(Family):
    """LLaVA-1.5: an image is one tile without row ends."""

    def tiles(self, model: Any, arguments: Arguments) -> list[int]:
        """Tiles per image, the base image counted."""
        return [1] * len(arguments[PIXELS["image"]])

    def tile_lengths(self, model: Any, arguments: Arguments) -> list[int]:
        """Visual tokens of one tile, per image."""
        if self._any_shape(model, arguments):
            return [rows * columns for rows, columns in self._shapes(model, arguments)]
        # "default" leaves the first hidden state out: [cls], where there is one.
        length = grid_side(model.config) ** 2 + model.has_cls - (self.strategy(model, arguments) == "default")
        return [length] * len(self.tiles(model, arguments))

    def pack(self, model: Any, tiles: list[torch.Tensor], newline: torch.Tensor, arguments: Arguments) -> Any:
        """Per image one row `(L, c)` of its values `(tiles, tokens per tile, c)`, with `newline` `(c,)` as row ends:
        the family's own packing code, which carries any value per patch along."""
        return [values[0] for values in tiles]

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout]:
        tiles, pixels = self.tiles(model, arguments), arguments[PIXELS["image"]]
        if not isinstance(pixels, torch.Tensor):
            raise ValueError(f"{PIXELS['image']} is a tensor of images or tiles; got a {type(pixels).__name__}.")
        if (len(tiles) if pixels.ndim == 5 else sum(tiles)) != len(pixels):
            raise ValueError(
                f"{len(pixels)} {'images' if pixels.ndim == 5 else 'tiles'} came with {len(tiles)} image_sizes"
                f"{'' if pixels.ndim == 5 else f' of {sum(tiles)} tiles'}."
            )
        labels = [
            torch.full((n, length, 1), float(PATCH)) for n, length in zip(tiles, self.tile_lengths(model, arguments))
        ]
        for label in labels:
            label[0] = BASE if len(label) > 1 else PATCH
        packed = self.pack(model, labels, torch.tensor([float(NEWLINE)]), arguments)
        shapes = self._shapes(model, arguments) if self._any_shape(model, arguments) else [None] * len(labels)
        # Where a family down-samples its grid, interpolation leaves labels a rounding error away from whole numbers.
        return [VisualLayout(kinds[:, 0].round().long(), grid=shape) for kinds, shape in zip(packed, shapes)]

    def encode_base(self, model: Any, arguments: Arguments) -> Any:
        """By the code of LLaVA-1.5, which has no tiles."""
        tiles, pixels = self.tiles(model, arguments), arguments[PIXELS["image"]]
        first = list(accumulate(tiles, initial=0))[:-1]
        base = pixels[:, 0] if pixels.ndim == 5 else pixels[first]
        settings = {name: value for name, value in arguments.items() if name not in _DESCRIBES_TILES}
        encode: Any = LlavaModel.get_image_features
        outputs = encode(model, base, **settings, return_dict=True)
        outputs[TOKENS] = list(outputs[TOKENS])
        return outputs

    def cls_similarity(
        self, model: Any, modality: str, outputs: Any, arguments: Arguments, base_alone: bool
    ) -> list[torch.Tensor]:
        similarity = self._cls_cosines(model, outputs, arguments)
        if not base_alone:
            parts = list(similarity.split(self.tiles(model, arguments)))
            similarity = self.pack(model, parts, similarity.new_zeros(1), arguments)
        return [row[:, 0] for row in similarity]

    def has_cls(self, model: Any) -> bool:
        names = [name for name, _ in model.vision_tower.named_parameters()]
        return any(name.endswith(("class_embedding", "cls_token")) for name in names)

    def select(self, model: Any, modality: str, arguments: Arguments, indices: list[int]) -> Arguments:
        pixels = arguments[PIXELS["image"]]
        tiles = pixels if pixels.ndim == 5 else pixels.split(self.tiles(model, arguments))
        chosen = [tiles[index] for index in indices]
        selected = {**arguments, PIXELS["image"]: (torch.stack if pixels.ndim == 5 else torch.cat)(chosen)}
        if arguments.get("image_sizes") is not None:
            selected["image_sizes"] = torch.as_tensor(arguments["image_sizes"])[indices]
        return selected

    def never_reads(self, config: PreTrainedConfig, key: str) -> bool:
        """Weights behind the hidden states that LLaVA selects: the tower's final norm, its head, and layers after the
        last used."""
        if "vision_tower." not in key:
            return False
        if re.search(r"\.(post_layernorm|head)\.", key):
            return True
        layer = re.search(r"\.encoder\.layers\.(\d+)\.", key)
        depth = getattr(config.vision_config, "num_hidden_layers", None)
        if layer is None or depth is None:
            return False
        # hidden_states[i] is what layer i reads, so selecting it takes the layers before it.
        selected = layer_list(config.vision_feature_layer)
        return int(layer.group(1)) >= max(index if index >= 0 else depth + 1 + index for index in selected)

    def strategy(self, model: Any, arguments: Arguments) -> str:
        """Whether the first hidden state, [cls] where there is one, is left out (`"default"`)."""
        return arguments.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy

    def _cls_cosines(self, model: Any, outputs: Any, arguments: Arguments) -> torch.Tensor:
        """`(tiles or frames, tokens, 1)` float32."""
        if not model.has_cls:
            raise ValueError(
                f"score='cls_similarity_low' and 'cls_similarity_high' need a vision tower with a [cls] token, and "
                f"{model.config.vision_config.model_type} has none: choose another score."
            )
        layers = arguments.get("vision_feature_layer")
        similarity = cls_cosines(outputs.hidden_states, model.config.vision_feature_layer if layers is None else layers)
        return similarity[:, 1:] if self.strategy(model, arguments) == "default" else similarity

    def _any_shape(self, model: Any, arguments: Arguments) -> bool:
        """Pixtral's tower takes images of any size; row ends are text there."""
        return arguments.get("image_sizes") is not None

    def _shapes(self, model: Any, arguments: Arguments) -> list[tuple[int, int]]:
        patch = model.vision_tower.patch_size
        return [(int(height) // patch, int(width) // patch) for height, width in arguments["image_sizes"]]


@dataclass(frozen=True)
class LlavaNextFamily(LlavaFamily):
    """LLaVA-NeXT (1.6): a base image, and tiles of a grid that fits the image, with row ends."""

    def tiles(self, model: Any, arguments: Arguments) -> list[int]:
        if arguments.get("image_sizes") is None:
            raise ValueError("image_sizes is missing beside pixel_values: pass everything that the processor returns.")
        config = model.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in arguments["image_sizes"]
        ]

    def pack(self, model: Any, tiles: list[torch.Tensor], newline: torch.Tensor, arguments: Arguments) -> Any:
        strategy = self.strategy(model, arguments)
        return model.pack_image_features(tiles, arguments["image_sizes"], strategy, image_newline=newline)[0]

    def _any_shape(self, model: Any, arguments: Arguments) -> bool:
        return False


@dataclass(frozen=True)
class LlavaOnevisionFamily(LlavaNextFamily):
    """LLaVA-OneVision: tiles for an image that is its prompt's only one, down-sampled grids, pooled video frames."""

    def tiles(self, model: Any, arguments: Arguments) -> list[int]:
        tiles = super().tiles(model, arguments)
        return [n if tiled else 1 for n, tiled in zip(tiles, self._are_tiled(arguments, len(tiles)))]

    def pack(self, model: Any, tiles: list[torch.Tensor], newline: torch.Tensor, arguments: Arguments) -> Any:
        ratio = arguments.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        sizes = arguments["image_sizes"]
        return model.pack_image_features(tiles, sizes, image_newline=newline, vision_aspect_ratio=ratio)[0]

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout]:
        if modality == "image":
            return super().layouts(model, modality, arguments)
        videos = arguments[PIXELS["video"]]
        if any(frames.ndim != 4 for frames in videos):
            raise ValueError(
                "pixel_values_videos is a tensor (videos, frames, channels, height, width), or a list of "
                f"(frames, channels, height, width); got videos of {videos[0].ndim} dimensions."
            )
        frame = model.apply_pooling(torch.zeros(1, grid_side(model.config) ** 2, 1)).shape[1]
        return [VisualLayout(torch.tensor([PATCH] * frame * len(v) + [NEWLINE]), len(v)) for v in videos]

    def must_encode(self, modality: str, arguments: Arguments) -> bool:
        """Videos of different lengths may come as a list, which the stock class does not take."""
        return modality == "video" and not isinstance(arguments[PIXELS["video"]], torch.Tensor)

    def encode(self, model: Any, modality: str, arguments: Arguments) -> Any:
        if modality == "image":
            return super().encode(model, modality, arguments)
        lengths = [len(layout) - 1 for layout in self.layouts(model, modality, arguments)]
        frames = torch.cat(list(arguments[PIXELS["video"]]))[None]  # all frames as one long video
        outputs = model.stock.get_video_features(model, **{**arguments, PIXELS["video"]: frames}, return_dict=True)
        newline = outputs[TOKENS][0, -1:]
        outputs[TOKENS] = [torch.cat([tokens, newline]) for tokens in outputs[TOKENS][0, :-1].split(lengths)]
        return outputs

    def cls_similarity(
        self, model: Any, modality: str, outputs: Any, arguments: Arguments, base_alone: bool
    ) -> list[torch.Tensor]:
        if modality == "image":
            return super().cls_similarity(model, modality, outputs, arguments, base_alone)
        frames = model.apply_pooling(self._cls_cosines(model, outputs, arguments)).flatten()
        lengths = [len(layout) - 1 for layout in self.layouts(model, modality, arguments)]
        return [torch.cat([values, values.new_zeros(1)]) for values in frames.split(lengths)]

    def joined(self, modality: str, tokens: list[torch.Tensor]) -> Any:
        return torch.cat(tokens)[None] if modality == "video" else tokens

    def select(self, model: Any, modality: str, arguments: Arguments, indices: list[int]) -> Arguments:
        if modality == "video":
            return {**arguments, PIXELS["video"]: [arguments[PIXELS["video"]][index] for index in indices]}
        selected = super().select(model, modality, arguments, indices)
        if arguments.get("batch_num_images") is not None:
            tiled = self._are_tiled(arguments, len(arguments["image_sizes"]))
            runs = [(one, len(list(run))) for one, run in groupby(tiled[index] for index in indices)]
            # Stock cannot say "one image, no tiles" but at the end, where it cuts off what is too much.
            if any(not one and length == 1 for one, length in runs[:-1]):
                raise ValueError("Continue these conversations one by one: their new images cannot be told apart.")
            counts = [n for one, length in runs for n in ([1] * length if one else [max(length, 2)])]
            selected["batch_num_images"] = counts
        return selected

    def _are_tiled(self, arguments: Arguments, count: int) -> list[bool]:
        """As stock reads `batch_num_images`."""
        per_prompt = arguments.get("batch_num_images")
        return [True] * count if per_prompt is None else [int(n) == 1 for n in per_prompt for _ in range(int(n))]


@dataclass(frozen=True)
class LlavaNextVideoFamily(LlavaNextFamily):
    """LLaVA-NeXT-Video: images as LLaVA-NeXT, frames pooled and without row ends."""

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout]:
        if modality == "image":
            return super().layouts(model, modality, arguments)
        videos, side = arguments[PIXELS["video"]], grid_side(model.config) // model.config.spatial_pool_stride
        return [VisualLayout.of_patches(len(frames) * side**2, len(frames), (side, side)) for frames in videos]

    def encode(self, model: Any, modality: str, arguments: Arguments) -> Any:
        outputs = super().encode(model, modality, arguments)
        if modality == "video":  # some releases keep frames apart
            outputs[TOKENS] = [video.reshape(-1, video.shape[-1]) for video in outputs[TOKENS]]
        return outputs

    def cls_similarity(self, model, modality, outputs, arguments, base_alone):
        if modality == "image":
            return super().cls_similarity(model, modality, outputs, arguments, base_alone)
        similarity, side = self._cls_cosines(model, outputs, arguments), grid_side(model.config)
        grids = similarity.view(-1, 1, side, side)
        pooled = torch.nn.functional.avg_pool2d(grids, model.config.spatial_pool_stride)
        return list(pooled.reshape(len(arguments[PIXELS["video"]]), -1))

    def joined(self, modality: str, tokens: list[torch.Tensor]) -> Any:
        """Stock flattens the first two axes of each video."""
        return [video[None] for video in tokens] if modality == "video" else tokens

    def select(self, model: Any, modality: str, arguments: Arguments, indices: list[int]) -> Arguments:
        if modality == "image":
            return super().select(model, modality, arguments, indices)
        return {**arguments, PIXELS["video"]: arguments[PIXELS["video"]][indices]}


@dataclass(frozen=True)
class GridFamily(Family):
    """Native resolution: an image is one grid of merged patches, a video one grid per temporal patch."""

    mrope: bool = True

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout]:
        merge, layouts = model.config.vision_config.spatial_merge_size, []
        patches, pixels = int(self._grids(modality, arguments).prod(-1).sum()), len(arguments[PIXELS[modality]])
        if patches != pixels:
            raise ValueError(f"{PIXELS[modality]} holds {pixels} patches, but {modality}_grid_thw says {patches}.")
        for frames, rows, columns in self._grids(modality, arguments).tolist():
            grid = (rows // merge, columns // merge)
            layouts.append(VisualLayout.of_patches(frames * grid[0] * grid[1], frames, grid))
        return layouts

    def select(self, model: Any, modality: str, arguments: Arguments, indices: list[int]) -> Arguments:
        grids = self._grids(modality, arguments)
        pixels = arguments[PIXELS[modality]].split(grids.prod(-1).tolist())
        chosen = torch.cat([pixels[index] for index in indices])
        return {**arguments, PIXELS[modality]: chosen, f"{modality}_grid_thw": grids[indices]}

    def _grids(self, modality: str, arguments: Arguments) -> torch.Tensor:
        name = f"{modality}_grid_thw"
        if arguments.get(name) is None:
            raise ValueError(
                f"{name} is missing beside {PIXELS[modality]}: pass everything that the processor returns."
            )
        return torch.as_tensor(arguments[name])


@dataclass(frozen=True)
class ShapedFamily(Family):
    """Native resolution without positions in three dimensions: the processor tells the shape of every image or tile.

    Args:
        shapes (`Callable`): `(config, arguments)` gives rows and columns of tokens per image; None if it is not told.
    """

    shapes: Callable[[PreTrainedConfig, Arguments], torch.Tensor | None] = lambda config, arguments: None

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout] | None:
        shapes = self.shapes(model.config, arguments) if modality == "image" else None
        if shapes is None:
            return None
        return [VisualLayout.of_patches(rows * columns, grid=(rows, columns)) for rows, columns in shapes.tolist()]


def _lfm2_shapes(config: PreTrainedConfig, arguments: Arguments) -> torch.Tensor | None:
    patches = arguments.get("spatial_shapes")
    return None if patches is None else torch.as_tensor(patches) // config.downsample_factor


def _kimi_shapes(config: PreTrainedConfig, arguments: Arguments) -> torch.Tensor | None:
    grids = arguments.get("image_grid_thw")
    kernel = config.vision_config.merge_kernel_size
    return None if grids is None else torch.as_tensor(grids)[:, 1:].cpu() // torch.as_tensor(kernel)


def _gemma4_shapes(config: PreTrainedConfig, arguments: Arguments) -> torch.Tensor | None:
    places = arguments.get("image_position_ids")  # (x, y) of each patch, -1 at padding
    kernel = config.vision_config.pooling_kernel_size
    return None if places is None else (torch.as_tensor(places).amax(1) + 1).flip(-1) // kernel


def tiles_of(length: Callable[[PreTrainedConfig], int]) -> Callable[[PreTrainedConfig, int], list[int]]:
    """`units` of a family whose entries hold any number of tiles of one length."""
    return lambda config, tokens: [length(config)] * (tokens // length(config))


def grid_side(config: PreTrainedConfig) -> int:
    """Patches along one side of a square image."""
    return config.vision_config.image_size // config.vision_config.patch_size


def layer_list(layers: int | list[int]) -> list[int]:
    """`vision_feature_layer`, which may be one index or several."""
    return [layers] if isinstance(layers, int) else list(layers)


def cls_cosines(hidden_states: Any, layers: int | list[int]) -> torch.Tensor:
    """`(images, tokens, 1)` float32: cosine of each hidden state with the first one, [cls], at the selected layers."""
    hidden = torch.cat([hidden_states[layer] for layer in layer_list(layers)], dim=-1).float()
    return torch.cosine_similarity(hidden, hidden[:, :1], dim=-1)[..., None]


def _several_images_or_video(call: Call) -> bool:
    """Whether a prompt has more than one image, told by token types, or a video."""
    if "video" in call.pixels or "video" in call.features:
        return True
    grids, features, types = call.visual.get("image_grid_thw"), call.features.get("image"), call.along.get(TYPES)
    count = len(features[TOKENS]) if features is not None else 0 if grids is None else len(grids)
    return count > (len(call.prompt) if types is None else int((types == 1).any(-1).sum()))


_DESCRIBES_TILES = (PIXELS["image"], "image_sizes", "batch_num_images", "vision_aspect_ratio")

_idefics_tiles = tiles_of(lambda config: grid_side(config) ** 2 // config.scale_factor**2)

_BOTH_WAYS = {CHUNKS: "visual tokens attend to each other both ways, and a chunk may end among them"}
_MIXED = {COPIES: "the stock class repeats images one by one and mixes those of a prompt"}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LlavaFamily("llava"),
        LlavaNextFamily("llava_next"),
        LlavaNextVideoFamily("llava_next_video"),
        LlavaOnevisionFamily("llava_onevision"),
        GridFamily("qwen2_vl", projector="visual"),
        GridFamily("qwen2_5_vl", projector="visual"),
        GridFamily("qwen3_vl", projector="visual"),
        GridFamily("qwen3_vl_moe", projector="visual"),
        GridFamily("qwen3_5", projector="visual"),
        GridFamily("qwen3_5_moe", projector="visual"),
        GridFamily("glm4v", projector="visual", video_as_image=True, refuses=_MIXED),
        GridFamily("glm46v", projector="visual", video_as_image=True, refuses=_MIXED),
        Family("internvl", stacked=True, runs=True),
        Family("gemma3", stacked=True, refuses=_BOTH_WAYS),
        ShapedFamily("gemma4", projector="embed_vision", refuses=_BOTH_WAYS, shapes=_gemma4_shapes),
        Family(
            "paligemma",
            stacked=True,
            refuses={**_BOTH_WAYS, UNTYPED: "without it, PaliGemma's attention depends on whether a prompt is padded"},
        ),
        Family("smolvlm", projector="connector", stacked=True, units=_idefics_tiles),
        Family("idefics3", projector="connector", stacked=True, units=_idefics_tiles),
        Family("mistral3"),
        Family("aya_vision", stacked=True),
        Family("cohere2_vision", stacked=True),
        Family("vipllava", stacked=True),
        Family("got_ocr2", stacked=True, runs=True),
        ShapedFamily("lfm2_vl", shapes=_lfm2_shapes),
        Family("deepseek_vl", projector="aligner", stacked=True),
        Family(
            "ovis2",
            projector="visual_embeddings_table",
            stacked=True,
            refuses={CHUNKS: "the stock class cannot split its visual indicators over chunks"},
        ),
        ShapedFamily("kimi_k25", projector="mm_projector", shapes=_kimi_shapes),
    )
}
