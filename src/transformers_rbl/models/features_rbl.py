"""Headless models prune what they encode: `get_image_features` and `get_video_features` return the tokens that stay."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, islice
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .codebook import RedundancyCodebook, choose
from .layout import BASE, VisualLayout, kept_counts, on_device
from .loading import stock_alone
from .modeling_rbl import RBLMixin
from .needed import encoded_alone, looking, needed_tiles, new_frames, rule_for
from .pruning import PruningConfig
from .seam import (
    GAPS,
    MASKS,
    MODALITIES,
    NEWLINES,
    PIXELS,
    TOKENS,
    VIEWS,
    as_stock,
    bound,
    check_settings,
    read_by_stock,
    without,
)
from .tower_views import each_once, encoder_path, those_needed


def get_image_features(self, *args, pruning: PruningConfig | dict | None = None, **kwargs):
    """Only the visual tokens that stay, a list with one tensor `(kept, d)` per image, beside `keep_masks`.

    Args:
        pruning ([`PruningConfig`] or `dict`, *optional*): settings for this call in place of the model's own;
            `PruningConfig(enabled=False)` gives the stock model's features.
    """
    return self.features("image", bound(self.stock.get_image_features, self, args, kwargs), pruning)


def get_video_features(self, *args, pruning: PruningConfig | dict | None = None, **kwargs):
    """Only the visual tokens that stay, a list with one tensor `(kept, d)` per video, beside `video_keep_masks`.

    Args:
        pruning ([`PruningConfig`] or `dict`, *optional*): settings for this call in place of the model's own;
            `PruningConfig(enabled=False)` gives the stock model's features.
    """
    return self.features("video", bound(self.stock.get_video_features, self, args, kwargs), pruning)


class RBLModelMixin(RBLMixin):
    """Headless models: they hold the codebook, and prune what they encode."""

    has_cls: bool

    def __init_subclass__(cls, stock: type | None = None, **kwargs):
        super().__init_subclass__(stock=stock, **kwargs)
        for method in (get_image_features, get_video_features):
            if stock is not None and hasattr(stock, method.__name__):
                setattr(cls, method.__name__, as_stock(method, getattr(stock, method.__name__)))

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.add_codebook()

    def add_codebook(self) -> None:
        """What a headless model has beside the stock one: room for the codebook that its config announces."""
        count, width = self.config.num_prototypes, self.config.get_text_config().hidden_size
        codebook = None if count is None else RedundancyCodebook.uninitialised(count, width, self.config.codebook)
        self.register_module("codebook", codebook)
        self.has_cls = self.family.has_cls(self)

    def layouts(self, modality: str = "image", **arguments: Any) -> list[VisualLayout] | None:
        """Where the visual tokens of each image or video lie, before anything is encoded.

        Args:
            modality (`str`): `"image"` or `"video"`.
            arguments: of `get_image_features` or `get_video_features`; others are not read.

        Returns:
            `list[VisualLayout]`; None for a family that knows it only once the images are encoded.
        """
        return self.family.layouts(self, modality, arguments)

    def token_kinds(self, modality: str = "image", **arguments: Any) -> list[torch.Tensor]:
        """What each visual token is: per image or video `(L,)` of BASE, PATCH and NEWLINE, see [`VisualLayout`].

        Args:
            modality (`str`): `"image"` or `"video"`.
            arguments: of `get_image_features` or `get_video_features`; others are not read.

        Raises:
            ValueError: for a family that knows its layout only once the images are encoded.
        """
        layouts = self.layouts(modality, **arguments)
        if layouts is None:
            raise ValueError(f"The layout of a {self.family.model_type} {modality} is known once it is encoded.")
        return [layout.kinds for layout in layouts]

    def features(
        self,
        modality: str,
        arguments: dict[str, Any],
        pruning: PruningConfig | dict | None,
        runs: list[list[int]] | None = None,
        texts: list[tuple[int, int, torch.Tensor]] | None = None,
    ) -> Any:
        """Encode images or videos and keep what the settings keep.

        Args:
            modality (`str`): `"image"` or `"video"`.
            arguments (`dict[str, Any]`): of the stock method.
            pruning ([`PruningConfig`] or `dict`, *optional*): default the model's own.
            runs (`list[list[int]]`, *optional*): lengths of runs of placeholders, where that tells which tiles are one
                image: of the whole prompt, and of what a cache does not hold of it.
            texts (`list[tuple[int, int, torch.Tensor]]`, *optional*): per prompt, for scorers that read the
                question, see [`~RBLMixin.prompt_texts`].

        Returns:
            What the stock method returns; pruned, `pooler_output` is a list, and the masks stand beside it.
        """
        check_settings(arguments)
        pruning = self.active_pruning(pruning)
        if pruning is None and not self.family.must_encode(modality, arguments):
            with stock_alone(self):
                return getattr(self.stock, f"get_{modality}_features")(self, **arguments)
        return_dict = arguments.pop("return_dict", None)
        if len(arguments[PIXELS[modality]]) == 0:
            raise ValueError(f"{PIXELS[modality]} holds no {modality}: leave it out.")
        arguments = self.family.on_host(arguments)
        if pruning is not None and pruning.tiles == "base":
            layouts = self.family.layouts_in_prompt(self, modality, arguments, runs)
        else:
            layouts = self.layouts(modality, **arguments)
        base_alone = pruning is not None and any(layout.base_alone(pruning) for layout in layouts or ())
        shorter = self
        if pruning is not None:
            arguments = {**arguments, **self.family.tower_arguments(pruning)}
            shorter, arguments = self.family.stopped(self, arguments)
        encoder = each_once(shorter) if pruning is not None and pruning.encode_once else shorter
        rules = there = None
        if pruning is not None and modality == "video" and pruning.frames == "where_needed":
            there, arguments, layouts, rules = self._new_frames(layouts or [], arguments, pruning)
        with stock_alone(encoder):
            if (
                pruning is not None
                and modality == "image"
                and any(layout.where_needed(pruning) for layout in layouts or ())
            ):
                if encoder_path(self) is None:
                    raise ValueError(
                        "tiles='where_needed' needs a CLIP or SigLIP tower that is called as its class says, without "
                        "hooks of accelerate and outside torch.compile: leave it at 'all'."
                    )
                looked = self.family.encode_base(encoder, arguments, layouts or [])
                layouts, rules, needed = self._where_needed(
                    looked[TOKENS], looked, layouts or [], pruning, arguments, texts
                )
                encoder = those_needed(encoder, looked, needed)
            if base_alone:
                outputs = self.family.encode_base(encoder, arguments, layouts or [])
            else:
                outputs = self.family.encode(encoder, modality, arguments)
        if pruning is not None:
            if not base_alone:
                outputs[TOKENS] = self.family.grouped(outputs[TOKENS], runs, layouts)
            self._prune(modality, outputs, layouts, rules or pruning, arguments, base_alone, texts=texts, there=there)
        if shorter is not self:  # nobody asked for them, and counted from the end they would be other layers'
            outputs = without(without(outputs, "last_hidden_state"), "hidden_states")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def prune_image_features(
        self,
        outputs: Any,
        pruning: PruningConfig | dict | None = None,
        runs: list[list[int]] | None = None,
        texts: list[tuple[int, int, torch.Tensor]] | None = None,
        **arguments: Any,
    ) -> Any:
        """Prune features that were encoded without pruning: several settings on one pass of the vision tower.

        Args:
            outputs (`BaseModelOutputWithPooling`): of `get_image_features(…, pruning=PruningConfig(enabled=False))`;
                with `output_hidden_states=True` too, where a rule reads the tower's attention.
            pruning ([`PruningConfig`] or `dict`, *optional*): default the model's own.
            runs (`list[list[int]]`, *optional*): lengths of the prompt's runs of placeholders, where that tells which
                tiles are one image, see [`Family.grouped`].
            texts (`list[tuple[int, int, torch.Tensor]]`, *optional*): of the prompt, where a rule reads the
                question, see [`~RBLMixin.prompt_texts`].
            arguments: the other arguments of that call, `pixel_values` included.

        Raises:
            ValueError: for `tiles="base"` without `runs`, where only the prompt tells which tile is the thumbnail.

        Returns:
            Features with `pooler_output` and `keep_masks`, for `mm_encoder_outputs={"image": …}`.
        """
        pruning = self.active_pruning(pruning)
        pruned = read_by_stock(outputs)
        if pruning is None:
            return pruned
        base = pruning.tiles == "base"
        layouts = self.family.layouts_in_prompt(self, "image", arguments, runs) if base else self.layouts(**arguments)
        pruned[TOKENS] = self.family.grouped(self.family.split(self.config, list(outputs[TOKENS])), runs, layouts)
        hidden = BaseModelOutputWithPooling(hidden_states=outputs.get("hidden_states"))
        rules = None
        if any(layout.where_needed(pruning) for layout in layouts or ()):
            if pruning.needs_of_tower:
                raise ValueError(
                    f"score={pruning.score!r} looks at the thumbnail's pass of the tower first under "
                    "tiles='where_needed': encode with these settings, not before."
                )
            base = [tokens[layout.kinds == BASE] for tokens, layout in zip(pruned[TOKENS], layouts or ())]
            layouts, rules, _ = self._where_needed(base, hidden, layouts or [], pruning, arguments, texts)
        self._prune("image", pruned, layouts, rules or pruning, arguments, tower_outputs=hidden, texts=texts)
        return pruned

    def _where_needed(
        self,
        base: list[torch.Tensor],
        states: Any,
        layouts: list[VisualLayout],
        pruning: PruningConfig,
        arguments: dict[str, Any],
        texts: list[tuple[int, int, torch.Tensor]] | None,
    ) -> tuple[list[VisualLayout], list[PruningConfig], list[list[bool]]]:
        """Which tiles are needed, given the tokens of the base images `(n, d)`; of each image its tokens that are there
        then, and the settings under which as many stay as with all tiles. The device is waited for, once."""
        look = replace(pruning, tiles="base")
        shares = self.family.tile_shares(self, arguments)
        lengths = [len(layout) for layout in layouts]
        needs = self.scorer_inputs("image", states, look, arguments, lengths, base_alone=True, texts=texts)
        tiled = [index for index, layout in enumerate(layouts) if layout.has_tiles]
        parts = [layouts[index].parts(base[index], look, **needs[index]) for index in tiled]
        thumbnails = [part for [part] in parts]
        kept = torch.cat([choice.kept for choice in choose(thumbnails, looking(pruning), self.codebook)])
        if pruning.keep_ratio is None:
            kept = kept | torch.cat([choice.kept for choice in choose(thumbnails, look, self.codebook)])
        kept = kept.cpu()
        kept_of = dict(zip(tiled, kept.split([len(base[index]) for index in tiled])))
        encoded, rules, needed = list(layouts), [pruning] * len(layouts), [[True] for _ in layouts]
        for index in tiled:
            layout, share = layouts[index], shares[index]
            needed[index] = needed_tiles(kept_of[index], layout, share, pruning.count_of(layout.numbers_scored))
            encoded[index] = encoded_alone(layout, share, needed[index])
            rules[index] = rule_for(layout, encoded[index], pruning)
        return encoded, rules, needed

    def _new_frames(
        self, layouts: list[VisualLayout], arguments: dict[str, Any], pruning: PruningConfig
    ) -> tuple[list[torch.Tensor], dict[str, Any], list[VisualLayout], list[PruningConfig]]:
        """Which tokens `(L,)` of each video belong to frames that are new, or row ends; and of these frames alone the
        arguments, the layouts, and the settings under which they keep what all frames would have. The device is waited
        for, once, before the tower runs."""
        said = [new_frames(frames) for frames in self.family.frames(self, arguments)]
        lengths, flat = [len(new) for new in said], iter(torch.cat(said).tolist())
        new = [list(islice(flat, length)) for length in lengths]
        for layout, frames in zip(layouts, new):
            if layout.kept_scored_count(pruning) == layout.scored_count(pruning):  # keeping all is the stock model
                frames[:] = [True] * len(frames)
        indices = [[number for number, is_new in enumerate(frames) if is_new] for frames in new]
        arguments = self.family.select_frames(self, arguments, indices)
        encoded = self.layouts("video", **arguments) or []
        rules = [rule_for(layout, own, pruning) for layout, own in zip(layouts, encoded, strict=True)]
        return [layout.of_frames(frames) for layout, frames in zip(layouts, new)], arguments, encoded, rules

    def scorer_inputs(
        self,
        modality: str,
        outputs: Any,
        pruning: PruningConfig,
        arguments: dict[str, Any],
        lengths: list[int],
        base_alone: bool = False,
        texts: list[tuple[int, int, torch.Tensor]] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """What the scorer needs beside the tokens, per image or video: `(L, ...)` each, row ends among them, and the
        question `(m, d)`.

        Args:
            modality (`str`): `"image"` or `"video"`.
            outputs: encoded features that hold the tower's hidden states.
            pruning (`PruningConfig`): whose scorer.
            arguments (`dict[str, Any]`): of the stock method.
            lengths (`list[int]`): visual tokens of each image or video in the prompt.
            base_alone (`bool`): whether the base images alone were encoded.
            texts (`list[tuple[int, int, torch.Tensor]]`, *optional*): see [`~RBLModelMixin.features`].

        Raises:
            ValueError: if the family or its vision tower has nothing of the kind, or there is no question.
        """
        inputs: list[dict[str, torch.Tensor]] = [{} for _ in lengths]
        if names := [name for name in pruning.needs_of_tower if name != "cls_similarity"]:
            try:
                inputs = self.family.tower_values(self, modality, outputs, arguments, base_alone, names)
            except ValueError as error:
                raise ValueError(f"score={pruning.score!r}: {error}") from error
        if pruning.needs_question:
            if texts is None:
                raise ValueError(
                    f"score={pruning.score!r} reads the question, and features that are encoded apart from a prompt "
                    "have none: choose another score, or pass pixel_values to forward or generate."
                )
            whole, beyond = ([text[place] for text in texts] for place in (0, 1))
            # The images of the whole prompt, or those that a cache does not hold.
            ends = list(accumulate(beyond if sum(lengths) == sum(beyond) else whole))
            for image, start in zip(inputs, accumulate(lengths, initial=0)):
                row = next((row for row, end in enumerate(ends) if start < end), len(ends) - 1)
                image["question"] = texts[row][2]
        if pruning.needs_cls_similarity:
            values = self.family.cls_similarity(self, modality, outputs, arguments, base_alone)
            for image, value in zip(inputs, values, strict=True):
                image["cls_similarity"] = value
        return inputs

    def _prune(
        self,
        modality: str,
        outputs: Any,
        layouts: list[VisualLayout] | None,
        pruning: PruningConfig | list[PruningConfig],
        arguments: dict[str, Any],
        base_alone: bool = False,
        tower_outputs: Any = None,
        texts: list[tuple[int, int, torch.Tensor]] | None = None,
        there: list[torch.Tensor] | None = None,
    ) -> None:
        """Take redundant tokens out of encoded features, in place.

        Args:
            outputs: features with a list of tokens per image; those of the base images alone with `base_alone`.
            layouts (`list[VisualLayout]`, *optional*): per image; by default images are patches and nothing else.
            pruning (`PruningConfig` or a list of them): of all images, or of each.
            tower_outputs: the output that holds the tower's hidden states, by default `outputs`.
            texts (`list[tuple[int, int, torch.Tensor]]`, *optional*): see [`~RBLModelMixin.features`].
            there (`list[torch.BoolTensor]`, *optional*): per image `(L,)`, which of its tokens the features and layouts
                are of; by default all. The others are dropped.
        """
        images = outputs[TOKENS]
        if layouts is None:
            layouts = [VisualLayout.of_patches(len(tokens)) for tokens in images]
        states = outputs if tower_outputs is None else tower_outputs
        rules = pruning if isinstance(pruning, list) else [pruning] * len(images)
        lengths = [len(own) for own in there or layouts]
        needs = self.scorer_inputs(modality, states, rules[0], arguments, lengths, base_alone, texts)
        parts = []
        for tokens, layout, inputs, rule in zip(images, layouts, needs, rules, strict=True):
            if not base_alone and len(tokens) != len(layout):
                raise ValueError(
                    f"The {modality} came as {len(tokens)} visual tokens where {len(layout)} were expected: pruning "
                    "does not know this vision tower's layout."
                )
            if not base_alone:
                tokens = layout.take_scored(tokens, rule)
                inputs = {
                    name: value if name == "question" else layout.take_scored(value, rule)
                    for name, value in inputs.items()
                }
            parts.append(layout.parts(tokens, rule, **inputs))
        if len(set(rules)) == 1:  # images of one size are scored together
            chosen = iter(choose([part for image in parts for part in image], rules[0], self.codebook))
            choices = [[next(chosen) for _ in image] for image in parts]
        else:
            choices = [choose(image, rule, self.codebook) for image, rule in zip(parts, rules)]
        masks = [layout.mask(choice, rule) for layout, choice, rule in zip(layouts, choices, rules)]
        counts = kept_counts(layouts, masks, rules)
        if base_alone:  # the others were never computed: they stand here as what no one reads, and row ends
            newline = getattr(self, "image_newline", None)
            images = [layout.with_unread(tokens, newline, rules[0]) for layout, tokens in zip(layouts, images)]

        def kept(view: list[torch.Tensor]) -> list[torch.Tensor]:
            images = zip(view, layouts, choices, masks, rules, counts, strict=True)
            return [layout.stay(tokens, choice, mask, rule, n) for tokens, layout, choice, mask, rule, n in images]

        outputs[TOKENS] = kept(images)
        for name in VIEWS:  # other views of the same tokens
            if outputs.get(name) is not None:
                outputs[name] = [kept(view) for view in outputs[name]]
        if there is not None:
            on = [on_device(own, mask) for own, mask in zip(there, masks, strict=True)]
            masks = [torch.zeros_like(own).masked_scatter_(own, mask) for own, mask in zip(on, masks)]
        outputs[MASKS[modality]] = masks
        if self.family.row_marks:  # they are text, which leaves the prompt later
            outputs[NEWLINES] = rules[0].newlines
        if rules[0].keep_positions and not self.family.mrope:  # where m-RoPE keeps them by itself
            outputs[GAPS] = True


def encoders(headless: Any) -> dict[str, Any]:
    """The encoding methods that a headless model has, by modality."""
    methods = {modality: getattr(headless, f"get_{modality}_features", None) for modality in MODALITIES}
    return {modality: method for modality, method in methods.items() if method is not None}
