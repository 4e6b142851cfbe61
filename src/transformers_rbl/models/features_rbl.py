"""Headless models prune what they encode: `get_image_features` and `get_video_features` return the tokens that stay.

How a family lays out the tokens of an image (tiles, row ends) is learnt by running its stock packing code on labels,
see `token_kinds`; the same code carries along any other value per patch.
"""

from itertools import accumulate

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .codebook import RedundancyCodebook, keep_mask
from .modeling_rbl import MASKS, RBLMixin, with_pruning
from .pruning import BASE, NEWLINE, PATCH, PruningConfig, keep_newlines


class RBLModelMixin(RBLMixin):
    """Headless models. Here an image is one tile without row ends, as in LLaVA-1.5; a family with another layout
    overrides `_num_tiles` and `_pack`."""

    def __init_subclass__(cls, stock=None, **kwargs):
        super().__init_subclass__(stock=stock, **kwargs)
        if stock is not None:
            cls.get_image_features = with_pruning(stock.get_image_features, RBLModelMixin._get_image_features)
            if hasattr(stock, "get_video_features"):
                cls.get_video_features = with_pruning(stock.get_video_features, RBLModelMixin._get_video_features)

    def __init__(self, config):
        super().__init__(config)
        count, width = config.num_prototypes, config.text_config.hidden_size
        self.register_module(
            "codebook", None if count is None else RedundancyCodebook.uninitialised(count, width, config.codebook)
        )
        names = [name for name, _ in self.vision_tower.named_parameters()]
        self._has_cls = any(name.endswith(("class_embedding", "cls_token")) for name in names)

    def _num_tiles(self, call: dict) -> list[int]:
        """Tiles per image, the base image counted."""
        return [1] * len(call["pixel_values"])

    def _tile_lengths(self, call: dict) -> list[int]:
        """Visual tokens of one tile, per image."""
        vision = self.config.vision_config
        # "default" leaves the first hidden state out: [cls], where there is one.
        length = (vision.image_size // vision.patch_size) ** 2 + self._has_cls - (self._strategy(call) == "default")
        return [length] * len(self._num_tiles(call))

    def _pack(self, tiles: list[torch.Tensor], newline: torch.Tensor, call: dict) -> list[torch.Tensor]:
        """Per image one row `(L, c)` of its values `(tiles, tokens per tile, c)`, with `newline` `(c,)` as row ends."""
        return [values[0] for values in tiles]

    def token_kinds(self, modality: str = "image", **call) -> list[torch.Tensor]:
        """What each visual token is.

        Args:
            modality (`str`): `"image"` or `"video"`.
            call: the arguments of `get_image_features` or `get_video_features`; others are not read.

        Returns:
            `list[torch.LongTensor]`: per image or video `(L,)` of BASE, PATCH and NEWLINE.
        """
        if modality == "video":
            videos = call["pixel_values_videos"]
            if any(frames.ndim != 4 for frames in videos):
                raise ValueError(
                    "pixel_values_videos is a tensor (videos, frames, channels, height, width), or a list of "
                    f"(frames, channels, height, width); got videos of {videos[0].ndim} dimensions."
                )
            grid = self.config.vision_config.image_size // self.config.vision_config.patch_size
            frame = self.apply_pooling(torch.zeros(1, grid**2, 1)).shape[1]
            return [torch.tensor([PATCH] * frame * len(frames) + [NEWLINE]) for frames in videos]
        tiles, pixels = self._num_tiles(call), call["pixel_values"]
        if (len(tiles) if pixels.ndim == 5 else sum(tiles)) != len(pixels):
            raise ValueError(
                f"{len(pixels)} {'images' if pixels.ndim == 5 else 'tiles'} came with {len(tiles)} image_sizes"
                f"{'' if pixels.ndim == 5 else f' of {sum(tiles)} tiles'}."
            )
        labels = [torch.full((n, length, 1), float(PATCH)) for n, length in zip(tiles, self._tile_lengths(call))]
        for label in labels:
            label[0] = BASE if len(label) > 1 else PATCH
        # Where a family down-samples its grid, interpolation leaves labels a rounding error away from whole numbers.
        return [kinds[:, 0].round().long() for kinds in self._pack(labels, torch.tensor([float(NEWLINE)]), call)]

    def _get_image_features(self, stock, call: dict, pruning):
        pruning = self._active_pruning(pruning)
        if pruning is None:
            return stock(self, **call)
        return_dict = call.pop("return_dict", None)
        kinds = self.token_kinds(**call)
        base_only = pruning.tiles == "base" and any((kind == BASE).any() for kind in kinds)
        outputs = self._base_features(call) if base_only else stock(self, **call, return_dict=True)
        return self._finish(outputs, "image", self._prune(outputs, kinds, pruning, call, base_only), return_dict)

    def prune_image_features(self, outputs, pruning: PruningConfig | dict | None = None, **call):
        """Prune features that were encoded without pruning: several settings on one pass of the vision tower.

        Args:
            outputs (`BaseModelOutputWithPooling`): of `get_image_features(…, pruning=PruningConfig(enabled=False))`.
            pruning ([`PruningConfig`] or `dict`, *optional*): default the model's own.
            call: the other arguments of that call, `pixel_values` included.

        Returns:
            `BaseModelOutputWithPooling` with `pooler_output` and `keep_masks`, for `mm_encoder_outputs={"image": …}`.
        """
        pruning = self._active_pruning(pruning)
        if pruning is None:
            return BaseModelOutputWithPooling(pooler_output=outputs.pooler_output)
        kept = self._prune(outputs, self.token_kinds(**call), pruning, call)
        return self._finish(BaseModelOutputWithPooling(), "image", kept, True)

    def _prune(self, outputs, kinds, pruning: PruningConfig, call: dict, base_encoded: bool = False) -> list:
        """Tokens that stay and their masks, per image; `base_encoded` features are of the base images alone."""
        similarities = [None] * len(kinds)
        if pruning.needs_cls_similarity:
            similarities = self._cls_similarity(outputs, call)
            if not base_encoded:
                similarities = self._pack(similarities.split(self._num_tiles(call)), similarities.new_zeros(1), call)
            similarities = [row[:, 0] for row in similarities]
        kept = []
        for tokens, kind, similarity in zip(outputs.pooler_output, kinds, similarities, strict=True):
            kind = kind.to(tokens.device)
            if base_encoded:
                kept.append(self._keep_base(tokens, kind, pruning, similarity))
                continue
            _check_layout(len(tokens), len(kind))
            base_only = pruning.tiles == "base" and bool((kind == BASE).any())
            scored = kind == BASE if base_only else kind != NEWLINE
            similarity = None if similarity is None else similarity[scored.to(similarity.device)]
            if base_only:
                kept.append(self._keep_base(tokens[scored], kind, pruning, similarity))
            else:
                kept.append(self._keep(tokens, kind, pruning, similarity))
        return kept

    def _get_video_features(self, stock, call: dict, pruning):
        """Videos of different lengths may come as a list, which the stock class does not take."""
        pruning = self._active_pruning(pruning)
        videos = call["pixel_values_videos"]
        if pruning is None and isinstance(videos, torch.Tensor):
            return stock(self, **call)
        return_dict = call.pop("return_dict", None)
        kinds = self.token_kinds("video", **call)
        call["pixel_values_videos"] = torch.cat(list(videos))[None]  # all frames as one long video
        outputs = stock(self, **call, return_dict=True)
        newline, lengths = outputs.pooler_output[0, -1:], [len(kind) - 1 for kind in kinds]
        tokens = [torch.cat([part, newline]) for part in outputs.pooler_output[0, :-1].split(lengths)]
        if pruning is None:
            return self._finish(outputs, "video", [(values, None) for values in tokens], return_dict)
        similarities = [None] * len(kinds)
        if pruning.needs_cls_similarity:
            similarities = self.apply_pooling(self._cls_similarity(outputs, call)).flatten().split(lengths)
        kept = [
            self._keep(values, kind.to(values.device), pruning, similarity, len(frames) if pruning.per_frame else 1)
            for values, kind, frames, similarity in zip(tokens, kinds, videos, similarities)
        ]
        return self._finish(outputs, "video", kept, return_dict)

    def _finish(self, outputs, modality: str, kept: list, return_dict: bool | None):
        outputs.pooler_output = [features for features, _ in kept]
        if kept[0][1] is not None:
            outputs[MASKS[modality]] = [mask for _, mask in kept]
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    def _keep(self, tokens, kinds, pruning: PruningConfig, cls_similarity=None, groups: int = 1):
        """The tokens of one image or video that stay, `(kept, d)`, and where they stood, `(L,)` bool. `groups` equal
        parts (frames) are scored and counted each by itself."""
        _check_layout(len(tokens), len(kinds))
        mask = kinds != NEWLINE
        mask[mask.clone()] = self._scored(tokens[mask], pruning, cls_similarity, groups)
        mask |= keep_newlines(mask, kinds, pruning.newlines)
        return tokens[mask], mask

    def _keep_base(self, tokens, kinds, pruning: PruningConfig, cls_similarity=None):
        """The same where `tokens` are the base image's alone, its tiles and row ends never computed."""
        has_tiles = bool((kinds == BASE).any())
        base = kinds == (BASE if has_tiles else PATCH)
        _check_layout(len(tokens), int(base.sum()))
        mask = base.clone()
        mask[base] = self._scored(tokens, pruning, cls_similarity)
        tokens = tokens[mask[base]]
        # Rows end with the tiles; "last" asks for one row end all the same. An image without tiles has its own.
        if not has_tiles or pruning.newlines == "last":
            newlines = keep_newlines(mask, kinds, pruning.newlines)
            tokens = torch.cat([tokens, self.image_newline.expand(int(newlines.sum()), -1).to(tokens)])
            mask |= newlines
        return tokens, mask

    def _scored(self, tokens, pruning: PruningConfig, cls_similarity, groups: int = 1) -> torch.Tensor:
        length = len(tokens) // groups
        similarities = [None] * groups if cls_similarity is None else cls_similarity.to(tokens.device).split(length)
        masks = (
            keep_mask(part, pruning, self.codebook, similarity, frame)
            for frame, (part, similarity) in enumerate(zip(tokens.split(length), similarities, strict=True))
        )
        return torch.cat(list(masks))

    def _base_features(self, call: dict):
        """Features of the base images alone, by the code of LLaVA-1.5, which has no tiles."""
        tiles, pixels = self._num_tiles(call), call["pixel_values"]
        first = list(accumulate(tiles, initial=0))[:-1]
        base = pixels[:, 0] if pixels.ndim == 5 else pixels[first]
        layout = ("pixel_values", "image_sizes", "batch_num_images", "vision_aspect_ratio")
        rest = {name: value for name, value in call.items() if name not in layout}
        return LlavaModel.get_image_features(self, base, **rest, return_dict=True)

    def _cls_similarity(self, outputs, call: dict) -> torch.Tensor:
        """`(tiles or frames, tokens, 1)` float32: cosine of each visual token's vision feature with [cls]'s."""
        if not self._has_cls:
            raise ValueError(
                f"score='cls_similarity_low' and 'cls_similarity_high' need a vision tower with a [cls] token, and "
                f"{self.config.vision_config.model_type} has none: choose another score."
            )
        layers = call.get("vision_feature_layer")
        layers = self.config.vision_feature_layer if layers is None else layers
        similarity = cls_cosines(outputs.hidden_states, layers)
        return similarity[:, 1:] if self._strategy(call) == "default" else similarity

    def _strategy(self, call: dict) -> str:
        return call.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy

    def _select(self, call: dict, indices: list[int], modality: str = "image") -> None:
        """Keep only these images or videos in the arguments `call`."""
        if modality == "video":
            call["pixel_values_videos"] = [call["pixel_values_videos"][i] for i in indices] or None
            return
        pixels = call["pixel_values"]
        tiles = pixels if pixels.ndim == 5 else pixels.split(self._num_tiles(call))
        chosen = [tiles[i] for i in indices]
        call["pixel_values"] = None if not chosen else (torch.stack if pixels.ndim == 5 else torch.cat)(chosen)
        if call.get("image_sizes") is not None:
            call["image_sizes"] = torch.as_tensor(call["image_sizes"])[indices]


def cls_cosines(hidden_states, layers: int | list[int]) -> torch.Tensor:
    """`(images, tokens, 1)` float32: cosine of each hidden state with the first one, [cls], at the selected layers."""
    layers = [layers] if isinstance(layers, int) else layers
    hidden = torch.cat([hidden_states[layer] for layer in layers], dim=-1).float()
    return torch.cosine_similarity(hidden, hidden[:, :1], dim=-1)[..., None]


def anyres_tiles(config, image_sizes) -> list[int]:
    """Tiles of each image `(height, width)` under the grids of a family with tiles, the base image counted."""
    if image_sizes is None:
        raise ValueError("image_sizes is missing beside pixel_values: pass everything that the processor returns.")
    return [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in image_sizes
    ]


def _check_layout(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"An image came as {found} visual tokens where {expected} were expected: pruning does not know this vision "
            "tower's layout (vision_feature_select_strategy?)."
        )
