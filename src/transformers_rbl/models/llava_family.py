"""LLaVA-1.5, NeXT, OneVision and NeXT-Video: base images, tiles, row ends, pooled frames."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import torch

from .family import Arguments, Family, grid_side
from .layout import BASE, NEWLINE, PATCH, VisualLayout
from .needed import in_patches
from .pruning import PruningConfig
from .seam import PIXELS, TOKENS
from .tower import queries_and_keys, received_attention
from .tower_views import up_to_layer


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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

    def stopped(self, model: Any, arguments: Arguments) -> tuple[Any, Arguments]:
        return stopped_behind(model, arguments, "vision_feature_layer")

    def encode_base(self, model: Any, arguments: Arguments, layouts: list[VisualLayout]) -> Any:
        """By the code of LLaVA-1.5, which has no tiles."""
        from transformers import LlavaModel  # late: importing this library imports no model's file

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
        return [values[:, 0] for values in self.laid_out(model, modality, similarity, arguments, base_alone)]

    def tower_arguments(self, pruning: PruningConfig) -> Arguments:
        needs_attention = any(name != "cls_similarity" for name in pruning.needs_of_tower)
        return {"output_hidden_states": True} if needs_attention else {}

    def tower_values(
        self, model: Any, modality: str, outputs: Any, arguments: Arguments, base_alone: bool, names: list[str]
    ) -> list[dict[str, torch.Tensor]]:
        if self._any_shape(model, arguments):
            return super().tower_values(model, modality, outputs, arguments, base_alone, names)
        given = arguments.get("vision_feature_layer")
        layers = layer_list(model.config.vision_feature_layer if given is None else given)
        depth = model.config.vision_config.num_hidden_layers
        last = max(layers, key=lambda layer: layer if layer >= 0 else depth + 1 + layer)  # of several, the deepest
        try:
            queries, keys = queries_and_keys(model.vision_tower, outputs.hidden_states, last)
        except ValueError as error:
            raise ValueError(
                f"{' and '.join(names)} cannot be had with this {self.model_type} model: {error}."
            ) from error
        images: list[dict[str, torch.Tensor]] = []
        for name in names:
            values = keys if name == "tower_keys" else received_attention(queries, keys, model.has_cls)[..., None]
            if self.strategy(model, arguments) == "default":
                values = values[:, 1:]
            shape = values.shape[2:]
            laid_out = self.laid_out(model, modality, values.flatten(2), arguments, base_alone)
            images = images or [{} for _ in laid_out]
            for image, own in zip(images, laid_out, strict=True):
                image[name] = own.view(-1, *shape) if name == "tower_keys" else own[:, 0]
        return images

    def laid_out(
        self, model: Any, modality: str, values: torch.Tensor, arguments: Arguments, base_alone: bool
    ) -> list[torch.Tensor]:
        """Values of the tower's tokens `(tiles or frames, tokens, c)` as its visual tokens lie: per image or video
        `(L, c)`, 0 at row ends."""
        if base_alone:
            return list(values)
        tiles = list(values.split(self.tiles(model, arguments)))
        return list(self.pack(model, tiles, values.new_zeros(values.shape[-1]), arguments))

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
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        if arguments.get("image_sizes") is None:
            raise ValueError("image_sizes is missing beside pixel_values: pass everything that the processor returns.")
        config = model.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in arguments["image_sizes"]
        ]

    def on_host(self, arguments: Arguments) -> Arguments:
        sizes = arguments.get("image_sizes")
        return arguments if sizes is None else {**arguments, "image_sizes": torch.as_tensor(sizes).tolist()}

    def pack(self, model: Any, tiles: list[torch.Tensor], newline: torch.Tensor, arguments: Arguments) -> Any:
        strategy = self.strategy(model, arguments)
        return model.pack_image_features(tiles, arguments["image_sizes"], strategy, image_newline=newline)[0]

    def tile_shares(self, model: Any, arguments: Arguments) -> list[torch.Tensor]:
        """By the family's own packing, which down-sampling mixes neighbours in."""
        counts = self.tiles(model, arguments)
        tiles = torch.eye(max(counts))
        own = [
            tiles[:count, None].expand(-1, length, -1)
            for count, length in zip(counts, self.tile_lengths(model, arguments))
        ]
        packed = self.pack(model, own, torch.zeros(max(counts)), arguments)
        return [shares[:, :count] for shares, count in zip(packed, counts)]

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

    def laid_out(
        self, model: Any, modality: str, values: torch.Tensor, arguments: Arguments, base_alone: bool
    ) -> list[torch.Tensor]:
        if modality == "image":
            return super().laid_out(model, modality, values, arguments, base_alone)
        frames = model.apply_pooling(values).flatten(0, 1)
        lengths = [len(layout) - 1 for layout in self.layouts(model, modality, arguments)]
        return [torch.cat([video, video.new_zeros(1, video.shape[1])]) for video in frames.split(lengths)]

    def frames(self, model: Any, arguments: Arguments) -> list[torch.Tensor]:
        return frames_in_patches(model, arguments)

    def select_frames(self, model: Any, arguments: Arguments, indices: list[list[int]]) -> Arguments:
        return with_frames(arguments, indices)

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
        if modality == "image":
            return super().encode(model, modality, arguments)
        lengths, videos = map(len, self.layouts(model, modality, arguments)), arguments[PIXELS["video"]]
        if not isinstance(videos, torch.Tensor):  # of different lengths: all frames as one long video
            videos = torch.cat(videos)[None]
        outputs = super().encode(model, modality, {**arguments, PIXELS["video"]: videos})
        tokens = [video.reshape(-1, video.shape[-1]) for video in outputs[TOKENS]]  # some releases keep frames apart
        outputs[TOKENS] = list(torch.cat(tokens).split(list(lengths)))
        return outputs

    def laid_out(
        self, model: Any, modality: str, values: torch.Tensor, arguments: Arguments, base_alone: bool
    ) -> list[torch.Tensor]:
        if modality == "image":
            return super().laid_out(model, modality, values, arguments, base_alone)
        side, width = grid_side(model.config), values.shape[-1]
        grids = values.mT.reshape(-1, width, side, side)
        pooled = torch.nn.functional.avg_pool2d(grids, model.config.spatial_pool_stride)
        lengths = [len(layout) for layout in self.layouts(model, modality, arguments)]
        return list(pooled.flatten(2).mT.flatten(0, 1).split(lengths))

    def frames(self, model: Any, arguments: Arguments) -> list[torch.Tensor]:
        return frames_in_patches(model, arguments)

    def select_frames(self, model: Any, arguments: Arguments, indices: list[list[int]]) -> Arguments:
        return with_frames(arguments, indices)

    def joined(self, modality: str, tokens: list[torch.Tensor]) -> Any:
        """Stock flattens the first two axes of each video."""
        return [video[None] for video in tokens] if modality == "video" else tokens

    def select(self, model: Any, modality: str, arguments: Arguments, indices: list[int]) -> Arguments:
        if modality == "image":
            return super().select(model, modality, arguments, indices)
        return {**arguments, PIXELS["video"]: arguments[PIXELS["video"]][indices]}


def frames_in_patches(model: Any, arguments: Arguments) -> list[torch.Tensor]:
    """`Family.frames` of videos `(frames, channels, height, width)`."""
    side = model.config.vision_config.patch_size
    return [in_patches(video, side) for video in arguments[PIXELS["video"]]]


def with_frames(arguments: Arguments, indices: list[list[int]]) -> Arguments:
    """`Family.select_frames` of such videos; a list, since their lengths may differ then."""
    videos = arguments[PIXELS["video"]]
    return {**arguments, PIXELS["video"]: [video[own] for video, own in zip(videos, indices, strict=True)]}


def layer_list(layers: int | list[int]) -> list[int]:
    """`vision_feature_layer`, which may be one index or several."""
    return [layers] if isinstance(layers, int) else list(layers)


def stopped_behind(model: Any, arguments: Arguments, name: str) -> tuple[Any, Arguments]:
    """[`Family.stopped`] where config and argument `name` the layer, or the layers, that are read."""
    given = arguments.get(name)
    selected = getattr(model.config, name) if given is None else given
    depth = getattr(model.config.vision_config, "num_hidden_layers", None)
    if depth is None or arguments.get("output_hidden_states") or arguments.get("output_attentions"):
        return model, arguments
    layers = [layer if layer >= 0 else depth + 1 + layer for layer in layer_list(selected)]
    view = up_to_layer(model, max(layers))
    if view is model:
        return model, arguments
    # Counted from the front, where a shorter tower's are the same.
    return view, {**arguments, name: layers[0] if isinstance(selected, int) else layers}


def cls_cosines(hidden_states: Any, layers: int | list[int]) -> torch.Tensor:
    """`(images, tokens, 1)` float32: cosine of each hidden state with the first one, [cls], at the selected layers."""
    hidden = torch.cat([hidden_states[layer] for layer in layer_list(layers)], dim=-1).float()
    return torch.cosine_similarity(hidden, hidden[:, :1], dim=-1)[..., None]


_DESCRIBES_TILES = (PIXELS["image"], "image_sizes", "batch_num_images", "vision_aspect_ratio")
