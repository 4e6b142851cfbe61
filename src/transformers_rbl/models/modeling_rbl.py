"""How transformers is taught to prune: the prompt loses the placeholders of visual tokens that were dropped.

Headless models prune what `get_image_features` returns and say what they kept, `keep_masks` (`features_rbl.py`).
`RBLMixin` is what headless and full models share: `prepare`, which makes the compact prompt, and `forward`. Full models
use the same `prepare` in `generate` (`generation_rbl.py`). Features that carry `keep_masks` belong to a prompt with all
its placeholders, features without to one that fits them already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from .family import CHUNKS
from .layout import on_device
from .loading import LoadingMixin, inherit_key_conversion, stock_alone
from .memory import Past, forgotten
from .positions import compact_positions, next_position
from .prompt import PromptPlan, PromptReading, check_placeholders, full_length, kept_rows
from .pruning import PruningConfig
from .seam import (
    ALONG,
    GAPS,
    MASKS,
    MODALITIES,
    NEWLINES,
    PIXELS,
    TOKENS,
    TYPES,
    VIEWS,
    Call,
    as_stock,
    bound,
    cache_of,
    check_stock,
    in_a_row,
    is_counted_for,
    misreads_gaps,
    read_by_stock,
    replaced,
    stock_positions,
    with_features,
)


@dataclass
class Prepared:
    """A call whose prompt fits the visual tokens that stay.

    Args:
        call ([`Call`]): what stock runs on.
        past ([`Past`]): what it continues.
        plan ([`PromptPlan`], *optional*): where the prompt's tokens went; None if none had to leave.
        masks (`dict[str, list[torch.BoolTensor]]`): by name of the output, which visual tokens stay.
        prompt_mask (`torch.BoolTensor` of shape `(batch, n)`): positions of the new prompt that stock runs on.
    """

    call: Call
    past: Past
    plan: PromptPlan | None
    masks: dict[str, list[torch.Tensor]]
    prompt_mask: torch.Tensor

    def remember(self, cache: Any, input_ids: torch.Tensor | None, times: int = 1) -> None:
        """Note on the cache what it holds of pruned prompts, `times` rows for each of the call's. Of one from which
        nothing had to leave too, where positions do not follow from the number of entries (m-RoPE)."""
        memory, positions = self.past.memory, self.call.position_ids
        own_positions = positions is not None and positions.ndim == 3
        if self.plan is not None and cache is not None and (own_positions or not self.plan.keeps_all):
            length = self.plan.mask.shape[1]
            upcoming = next_position(self.plan, None if positions is None else positions[..., -length:])
            self.plan.remember(input_ids, upcoming).repeat(times).attach(cache)
        elif memory is not None and cache is not None and times > 1:
            memory.repeat(times).attach(cache)


class RBLMixin(LoadingMixin):
    """What the headless and the full class share: prompt compaction, and `forward`."""

    def __init_subclass__(cls, stock: type | None = None, **kwargs):
        """`stock` is the class that this one prunes: its signatures are taken over, and its checkpoints are read as it
        does. A stock class that is not understood whole is refused here."""
        super().__init_subclass__(**kwargs)
        if stock is not None:
            check_stock(stock, cls.family.mrope)
            cls.stock = stock
            cls.forward = as_stock(cls.forward, stock.forward)
            inherit_key_conversion(cls, stock, headless=not hasattr(cls, "generate"))

    def forward(self, *args, pruning: PruningConfig | dict | None = None, **kwargs):
        """A pruned model takes one more argument, and says in its output which tokens it kept.

        Args:
            pruning ([`PruningConfig`] or `dict`, *optional*): settings for this call in place of the model's own;
                `PruningConfig(enabled=False)` gives the stock model's answer.
        """
        pruning = None if pruning is None else PruningConfig.from_dict(pruning)  # wrong ones are refused, images or not
        call = Call.read(bound(self.stock.forward, self, args, kwargs))
        past = Past.of(call.cache)
        if past.memory is None and not self.prunes(call, pruning):
            with stock_alone(self):
                outputs = self._run(call)
            if "labels" in call.along and isinstance(outputs, ModelOutput) and self._labels_beside(pruning):
                outputs["labels"] = call.along["labels"]  # as in batches with images: Trainer gathers them beside these
            return outputs

        return_dict = call.others.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        original_ids = call.input_ids
        call.refuse_what_cannot_follow()
        if call.position_ids is None:
            call.position_ids = stock_positions(self, call, past, seen=0)
        prepared = self.prepare(call, past, pruning)
        call = prepared.call
        counts_itself = call.position_ids is None or call.position_ids.ndim == 3
        if prepared.plan is not None and prepared.plan.is_full and past.cache is None and counts_itself:
            # It says nothing, and stock would wait for the device to learn that. Beside a user's positions it says that
            # sequences are not packed.
            call.attention_mask = None
        with forgotten(past):
            outputs = self._run(call, return_dict=True)
        prepared.remember(cache_of(outputs), original_ids if past.length == 0 else None)
        extras: dict[str, Any] = {**prepared.masks, "prompt_mask": prepared.prompt_mask}
        if "labels" in call.along:
            extras["labels"] = call.along["labels"]
        if self.config.full_length_logits:
            extras.pop("labels", None)
            if prepared.plan is not None:
                # Of a full model the logits; of a headless one what their head reads: TRL calls it by itself.
                name = "logits" if "logits" in outputs else "last_hidden_state"
                outputs[name] = full_length(outputs[name], prepared.plan)
                extras["prompt_mask"] = torch.ones_like(prepared.prompt_mask)
        if not return_dict:
            return outputs.to_tuple()
        for key, value in extras.items():
            outputs[key] = value
        return outputs

    def prunes(self, call: Call, pruning: PruningConfig | None) -> bool:
        """Whether there is something to prune, or pruned already, in this call; or pixels that stock cannot take."""
        if any(mask in features for features in call.features.values() for mask in MASKS.values()):
            return True
        with_pixels = [modality for modality in MODALITIES if modality in call.pixels]
        if any(self.family.must_encode(m, call.arguments_of_encoder(self._encoder(m), m)) for m in with_pixels):
            return True
        return bool(with_pixels) and self.active_pruning(pruning) is not None

    def prepare(self, call: Call, past: Past, pruning: PruningConfig | None, seen: int = 0) -> Prepared:
        """Encode, keep, plan, compact: what `forward` and `generate` do before stock runs.

        Args:
            call ([`Call`]): left as it is.
            past ([`Past`]): of its cache.
            pruning ([`PruningConfig`], *optional*): default the model's own.
            seen (`int`): leading columns of the prompt that the cache stands for already.

        Raises:
            ValueError: if images and placeholders do not match.
        """
        self.family.check_call(call)
        if past.memory is not None and (call.pixels or call.prompt.shape[1] - seen > 1):  # one token goes on answering
            self.refuse_another_question(pruning)
        call = call.copy()
        encoded = [m for m in call.pixels if hasattr(self.base_model, f"get_{m}_features")]
        slots = {m: self.placeholders(m, call) for m in MODALITIES if m in call.features or m in encoded}
        reading = PromptReading(call.attention_mask, call.prompt.shape[:2], slots, past.length, seen)
        if past.memory is not None:
            past.memory.check(len(call.prompt))
        features = self._encode(call, pruning, reading)
        if seen:
            features = _beyond_cache(features, reading)
            slots = {modality: where[:, seen:] for modality, where in slots.items()}
            for name in ("input_ids", "inputs_embeds"):
                if getattr(call, name) is not None:
                    setattr(call, name, getattr(call, name)[:, seen:])
        masks = {key: features[m][key] for m, key in MASKS.items() if key in features.get(m, {})}
        lost = _lost(features, reading)
        dropped = torch.zeros(call.prompt.shape[:2], dtype=torch.bool, device=call.prompt.device)
        for modality, key in MASKS.items():
            if masks.get(key):
                gone = ~torch.cat([on_device(mask, dropped) for mask in masks[key]])
                dropped = dropped.masked_scatter(slots[modality], gone)
        marked = any(output.get(NEWLINES, "all") != "all" for output in features.values())
        if marked:
            dropped = dropped | self._dropped_row_marks(slots, dropped, features)
        plan, prompt_mask = None, torch.ones_like(dropped)
        own_positions = call.position_ids is not None and call.position_ids.ndim == 3
        gaps = {output.get(GAPS, False) for m, output in features.items() if MASKS[m] in output}
        if len(gaps) > 1:
            raise ValueError(
                "keep_positions differs between the images and the videos of this prompt: prune both alike."
            )
        if past.memory is not None or any(lost) or own_positions or marked:
            # How many tokens of a partly hidden image stay, and marks of its rows, is for the device to say.
            lost = None if reading.hidden or marked else lost
            plan = PromptPlan(dropped, call.attention_mask, past.length, past.memory, reading, lost, gaps == {True})
            if plan.keeps_positions and past.entries > 0 and misreads_gaps(self):
                raise ValueError(
                    "keep_positions leaves gaps, which transformers' FlashAttention reads as packed sequences behind a "
                    "cache: load the model with attn_implementation='sdpa', or give pruning= without it here."
                )
            if reading.hidden:
                features = {m: _attended(output, slots[m] & ~dropped, plan.kept) for m, output in features.items()}
            self._compact(call, plan)
            prompt_mask = plan.kept
        length = call.prompt.shape[1]
        counted = {m: length if MASKS[m] in output and m in slots else None for m, output in features.items()}
        call.features = {m: read_by_stock(output, counted[m]) for m, output in features.items() if len(output[TOKENS])}
        return Prepared(call, past, plan, masks, prompt_mask)

    def placeholders(self, modality: str, call: Call) -> torch.Tensor:
        """`(batch, L)` bool: where the prompt waits for visual tokens."""
        token_id = getattr(self.config, f"{modality}_token_id")
        if self.family.video_as_image and call.input_ids is not None and TYPES in call.along:
            kind = MODALITIES.index(modality) + 1
            types = call.along[TYPES][:, -call.input_ids.shape[1] :]
            return (call.input_ids == self.config.image_token_id) & (types == kind)
        if call.input_ids is not None:
            return call.input_ids == token_id
        token = torch.full((), token_id, dtype=torch.long, device=call.prompt.device)
        return (call.prompt == self.get_input_embeddings()(token)).all(-1)

    def prompt_texts(self, modality: str, call: Call, seen: int = 0) -> list[tuple[int, int, torch.Tensor]]:
        """Per prompt how many placeholders of a modality it has, how many of them beyond a cache, and the language
        model's embeddings `(m, d)` of its text there: what rules that read the question are given. Of a prompt to train
        on, the text that has no label.

        Args:
            modality (`str`): `"image"` or `"video"`.
            call ([`Call`]): with ids or embeddings.
            seen (`int`): leading columns of the prompt that a cache holds; the question is what follows.

        Raises:
            ValueError: if labels cover all the text of a prompt with images: it has no question.
        """
        slots = {m: self.placeholders(m, call) for m in MODALITIES if hasattr(self.config, f"{m}_token_id")}
        length = call.prompt.shape[1]
        text = ~torch.stack(list(slots.values())).any(0)
        if call.attention_mask is not None:
            text = text & call.attention_mask[:, -length:].bool().to(text.device)
        if "labels" in call.along:
            text = text & (call.along["labels"][:, -length:] == ALONG["labels"]).to(text.device)
        text[:, :seen] = False
        texts = []
        with torch.no_grad():
            for prompt, own, places in zip(call.prompt, slots[modality], text):
                words = prompt[places]
                embeddings = words if words.is_floating_point() else self.get_input_embeddings()(words)
                if "labels" in call.along and not len(embeddings) and bool(own.any()):
                    raise ValueError(
                        "A score that reads the question finds none: labels cover all the text of a prompt with "
                        f"images. Give its question the label {ALONG['labels']:.0f}, or choose another score."
                    )
                texts.append((int(own.sum()), int(own[seen:].sum()), embeddings))
        return texts

    def reads_question(self, pruning: PruningConfig | dict | None) -> bool:
        """Whether a call under these settings (default the model's own) chooses tokens by the question."""
        settings = self.active_pruning(pruning)
        return settings is not None and settings.needs_question

    def refuse_another_question(self, pruning: PruningConfig | dict | None) -> None:
        """Raise a `ValueError` where tokens in a cache were chosen by a question, and another one comes."""
        if self.reads_question(pruning):
            raise ValueError(
                "score='cdpruner' and other scores that read the question cannot go on with this cache: its visual "
                "tokens were chosen by the question before. Start with a new cache, or choose another score."
            )

    def padding_id(self) -> int:
        """An id for padding; not a placeholder's."""
        placeholders = {getattr(self.config, f"{modality}_token_id", None) for modality in MODALITIES}
        candidates = (self.config.get_text_config().pad_token_id, 0, 1, 2)
        return next(token for token in candidates if token is not None and token not in placeholders)

    def _encoder(self, modality: str) -> Any:
        return getattr(self.base_model, f"get_{modality}_features")

    def _encode(self, call: Call, pruning: PruningConfig | None, reading: PromptReading) -> dict[str, Any]:
        """Visual features by modality, encoded here or passed in. Pixels leave the call."""
        features, call.features = call.features, {}
        if features and pruning is not None:
            raise ValueError("mm_encoder_outputs are encoded already: give pruning= to get_image_features instead.")
        has_encoder = [m for m in MODALITIES if hasattr(self.base_model, f"get_{m}_features")]
        for modality in has_encoder:
            if modality not in call.pixels or len(call.pixels[modality]) == 0:
                continue
            if modality in features:
                raise ValueError(f"Give either {PIXELS[modality]} or mm_encoder_outputs for the {modality}s, not both.")
            arguments = {**call.arguments_of_encoder(self._encoder(modality), modality), "return_dict": True}
            apart = self.family.apart
            runs = None if apart is None else reading.runs(modality, apart)
            texts = self.prompt_texts(modality, call, reading.seen) if self.reads_question(pruning) else None
            features[modality] = self.base_model.features(modality, arguments, pruning, runs, texts)
        call.drop_visual([self._encoder(modality) for modality in has_encoder])
        return features

    def _dropped_row_marks(
        self, slots: dict[str, torch.Tensor], dropped: torch.Tensor, features: dict[str, Any]
    ) -> torch.Tensor:
        """`(batch, L)` bool: row ends written as text that leave with their rows, by the `newlines` of the settings
        that the features were pruned under."""
        marks = torch.zeros_like(dropped)
        for modality, key in MASKS.items():
            newlines = features.get(modality, {}).get(NEWLINES, "all")
            if newlines != "all" and (masks := features[modality].get(key)):
                placed = slots[modality]
                numbers = torch.cat([torch.full((len(mask),), number) for number, mask in enumerate(masks)])
                images = torch.zeros_like(placed, dtype=torch.long).masked_scatter(placed, on_device(numbers, placed))
                kept = placed & ~dropped
                marks |= row_marks(placed, images) if newlines == "last" else empty_rows(placed, images, kept)
        return marks

    def _compact(self, call: Call, plan: PromptPlan) -> None:
        """Take dropped placeholders out of everything in the call that runs along the prompt."""
        length = plan.kept.shape[1]
        # Beside positions with gaps a mask says that sequences are not packed.
        if call.attention_mask is not None or not plan.is_full or plan.keeps_positions:
            dtype = torch.long if call.attention_mask is None else call.attention_mask.dtype
            call.attention_mask = plan.attention_mask.to(dtype)
        if isinstance(call.rows, torch.Tensor):
            call.rows = kept_rows(plan, call.rows)
        positions = call.position_ids
        call.position_ids = compact_positions(plan, None if positions is None else positions[..., -length:])
        if call.input_ids is not None:
            call.input_ids = plan.take(call.input_ids, fill=self.padding_id())
        if call.inputs_embeds is not None:
            call.inputs_embeds = plan.take(call.inputs_embeds)
        call.along = {name: plan.take(values[:, -length:], ALONG[name]) for name, values in call.along.items()}

    def _run(self, call: Call, **settings: Any) -> Any:
        """Stock `forward`. Features that were counted are put in their places here: stock would ask the device whether
        they fit, and wait. Where it reads them for more than their places, it gets them as they are."""
        counted = all(is_counted_for(call.prompt.shape[1], output) for output in call.features.values())
        features = {}
        for modality, output in call.features.items():
            if not isinstance(output[TOKENS], torch.Tensor):  # apart, as `generate` needs them to repeat rows
                output = replaced(output, **{TOKENS: self.family.joined(modality, list(output[TOKENS]))})
            features[modality] = output
        call = replace(call, features=features)
        if not features or not counted or CHUNKS in self.family.refuses:
            return self.stock.forward(self, **call.arguments(), **settings)
        embeds: Any = call.inputs_embeds if call.input_ids is None else self.get_input_embeddings()(call.input_ids)
        for modality, output in features.items():
            tokens = in_a_row(output[TOKENS]).to(embeds.device, embeds.dtype, non_blocking=True)
            embeds = embeds.masked_scatter(self.placeholders(modality, call)[..., None], tokens)
        call = replace(call, input_ids=None, inputs_embeds=embeds, features={})
        return with_features(self.stock.forward(self, **call.arguments(), **settings), features)

    def _labels_beside(self, pruning: PruningConfig | None) -> bool:
        """Whether outputs carry the labels that belong to their logits."""
        pruning = self.pruning if pruning is None else pruning
        return pruning is not None and pruning.enabled and not self.config.full_length_logits


def row_marks(slots: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """`(batch, L)` bool: single tokens between two placeholders `slots` of one image, whose number is in `images`."""
    marks = torch.zeros_like(slots)
    same = images[:, :-2] == images[:, 2:]
    marks[:, 1:-1] = ~slots[:, 1:-1] & slots[:, :-2] & slots[:, 2:] & same
    return marks


def empty_rows(slots: torch.Tensor, images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Those of `row_marks` before which no placeholder of their row is `kept` `(batch, L)`."""
    starts = slots & ~torch.nn.functional.pad(slots, (1, 0))[:, :-1]
    row = starts.cumsum(1)  # of a mark, the row before it
    count = torch.zeros(len(row), row.shape[1] + 1, dtype=torch.long, device=row.device)
    count.scatter_add_(1, row, kept.long())
    return row_marks(slots, images) & (count.gather(1, row) == 0)


def spans(columns: list[int], lengths: list[int], seen: int, modality: str) -> list[tuple[int, int]]:
    """First and last column of each image's placeholders, given those of all, in order.

    Raises:
        ValueError: if column `seen`, where a cache ends, lies within an image.
    """
    places, start = [], 0
    for length in lengths:
        first, last = columns[start], columns[start + length - 1]
        if first < seen <= last:
            raise ValueError(f"The cache ends in the middle of an {modality}: start with a new cache.")
        places.append((first, last))
        start += length
    return places


def _beyond_cache(features: dict[str, Any], reading: PromptReading) -> dict[str, Any]:
    """Without the features whose placeholders the cache holds already."""
    for modality, key in MASKS.items():
        if modality not in features:
            continue
        output, columns, seen = features[modality], reading.all_columns(modality), reading.seen
        lengths = [len(tokens) for tokens in output.get(key) or output[TOKENS]]
        if sum(lengths) != len(columns):
            continue  # the new images alone, or a mismatch, which _lost will name
        new = [i for i, (first, _) in enumerate(spans(columns, lengths, seen, modality)) if first >= seen]
        parts = {name: [output[name][i] for i in new] for name in (TOKENS, key) if name in output}
        parts |= {n: [[view[i] for i in new] for view in output[n]] for n in VIEWS if output.get(n) is not None}
        features = {**features, modality: replaced(output, **parts)}
    return features


def _lost(features: dict[str, Any], reading: PromptReading) -> list[int]:
    """Visual tokens that pruning drops from each row, told by shapes alone. Placeholders and images that do not match
    raise."""
    lost = [0] * len(reading.attended)
    for modality, key in MASKS.items():
        if modality in features and features[modality].get(key):
            before, after = ([len(part) for part in features[modality][name]] for name in (key, TOKENS))
            for row, images in enumerate(check_placeholders(reading.counts(modality), before, modality)):
                lost[row] += sum(before[image] - after[image] for image in images)
    return lost


def _attended(output: Any, placed: torch.Tensor, kept: torch.Tensor) -> Any:
    """Features without those of masked placeholders, which leave the prompt as padding does.

    Args:
        output: features of the tokens that stand at `placed`.
        placed (`torch.BoolTensor` of shape `(batch, n)`): placeholders that pruning keeps.
        kept (`torch.BoolTensor` of shape `(batch, n)`): positions that stay, attended ones only.
    """
    survives, lengths = kept[placed], [len(tokens) for tokens in output[TOKENS]]
    if survives.all() or sum(lengths) != len(survives):  # stock names a mismatch of features that were not pruned here
        return output
    parts = survives.split(lengths)
    chosen = [i for i, part in enumerate(parts) if part.any()]

    def attended(view):
        return [view[i][parts[i].to(view[i].device)] for i in chosen]

    views = {name: list(map(attended, output[name])) for name in VIEWS if output.get(name) is not None}
    return replaced(output, **{TOKENS: attended(output[TOKENS])}, **views)
