"""`generate` on compact prompts, with stock-shaped answers.

The prompt loses the placeholders of dropped visual tokens before stock `generate` starts, so that every decoding mode
and cache runs as it is. What the user gives and gets speaks of the original prompt: sequences, lengths, processors,
streamers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .codebook import RedundancyCodebook
from .loading import stock_alone
from .memory import Past, forgotten
from .modeling_rbl import Prepared, RBLMixin, spans
from .prompt import PromptPlan, PromptReading
from .pruning import PruningConfig
from .seam import MODALITIES, Call, as_stock, bound, cache_of, can_chunk_images, misreads_gaps, stock_positions


class RBLGenerationMixin(RBLMixin):
    """Full models: a headless RBL model inside, and `generate` on compact prompts with stock-shaped answers."""

    headless: type

    def __init_subclass__(cls, stock: type | None = None, headless: type | None = None, **kwargs):
        if headless is not None:
            cls.headless, cls.full, headless.full, cls.family = headless, cls, cls, headless.family
        super().__init_subclass__(stock=stock, **kwargs)
        if stock is not None:
            cls.generate = as_stock(cls.generate, stock.generate)
            for method in (get_image_features, get_video_features):
                if hasattr(stock, method.__name__):
                    setattr(cls, method.__name__, as_stock(method, getattr(stock, method.__name__)))

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model.__class__ = self.headless  # stock has built a stock one, of the same layout
        self.model.add_codebook()

    @property
    def codebook(self) -> RedundancyCodebook | None:
        return self.model.codebook

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "codebook":  # nn.Module would register a second one here, behind the property
            self.set_codebook(value)
        else:
            super().__setattr__(name, value)

    def generate(self, *args, pruning: PruningConfig | dict | None = None, **kwargs):
        """A pruned model takes one more argument. Sequences begin with the original `input_ids`; lengths count them.

        Args:
            pruning ([`PruningConfig`] or `dict`, *optional*): settings for this call in place of the model's own;
                `PruningConfig(enabled=False)` gives the stock model's answer.
        """
        pruning = None if pruning is None else PruningConfig.from_dict(pruning)  # wrong ones are refused, images or not
        arguments = bound(self.stock.generate, self, args, kwargs)
        if (ids := arguments.pop("inputs", None)) is not None:
            if arguments.get("input_ids") is not None:
                raise ValueError("The prompt was given twice, as inputs and input_ids: give one.")
            arguments["input_ids"] = ids
        call = Call.read(arguments)
        past = Past.of(call.cache)
        if past.memory is None and not self.prunes(call, pruning):
            with stock_alone(self):
                return self.stock.generate(self, **call.arguments())
        self._check_generation(call)
        call.refuse_what_cannot_follow()

        prompt, original_ids = call.prompt, call.input_ids
        if call.attention_mask is None:
            call.attention_mask = self._infer_attention_mask(call, prompt)
        # As in stock: the full prompt, or what is new of it beside a mask for all.
        seen = past.length if prompt.shape[1] == call.attention_mask.shape[-1] else 0
        if past.memory is not None:
            past.memory.check(len(prompt), original_ids if seen else None)
        if seen >= prompt.shape[1]:
            raise ValueError(
                f"The cache stands for {past.length} tokens already; a prompt of {prompt.shape[1]} adds none to answer."
            )
        if call.position_ids is None:
            call.position_ids = stock_positions(self, call, past, seen)
        if past.length > 0 and past.memory is None and call.position_ids is None:
            call.position_ids = (call.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            self._skip_cached_images(call, seen)
            prepared = self.prepare(call, past, pruning, seen)

        plan, compact, compact_length = prepared.plan, prepared.call.copy(), 0
        if plan is not None and plan.keeps_positions:
            self._check_gaps(call)
        if plan is None:
            compact.input_ids, compact.inputs_embeds = call.input_ids, call.inputs_embeds
        else:
            if compact.position_ids is None:  # as stock would count
                compact.position_ids = (plan.mask.long().cumsum(-1) - 1).clamp(min=0)
                prepared.call.position_ids = compact.position_ids
            if past.entries > 0:
                self._prepend_cached(compact, plan, call, seen)
            compact_length = (compact.prompt if compact.input_ids is None else compact.input_ids).shape[1]
            self._shift_lengths(compact, prompt.shape[1], compact_length)
            if original_ids is not None:
                self._show_original(compact, original_ids, compact_length)

        with forgotten(past):
            result = self.stock.generate(self, **compact.arguments())
        return self._in_original_terms(result, prepared, prompt, original_ids, compact_length, seen)

    def _in_original_terms(
        self,
        result: Any,
        prepared: Prepared,
        prompt: torch.Tensor,
        original_ids: torch.Tensor | None,
        compact_length: int,
        seen: int,
    ) -> Any:
        """Sequences that begin with the original prompt, masks beside them, and a cache that knows what it holds."""
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        times, cache = len(sequences) // len(prompt), prepared.past.cache
        if prepared.plan is not None and original_ids is not None:
            sequences = _with_prompt(sequences, original_ids, compact_length)
        if isinstance(result, torch.Tensor):
            result = sequences
        else:
            result.sequences, returned = sequences, cache_of(result)
            cache = cache if returned is None else returned
            for key, masks in prepared.masks.items():
                result[key] = masks
            mask = prepared.call.attention_mask
            seen_by_model = prepared.prompt_mask if prepared.plan is not None or mask is None else mask
            result["prompt_mask"] = seen_by_model[:, -prepared.prompt_mask.shape[1] :].bool()
        prepared.remember(cache, original_ids if seen == prepared.past.length else None, times)
        return result

    def _option(self, call: Call, name: str, default: Any = None) -> Any:
        """A generation option, from wherever stock `generate` would read it."""
        configs = (call.others.get("generation_config"), self.generation_config)
        values = (call.others.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), default)

    def _check_generation(self, call: Call) -> None:
        """Refuse what cannot work on compact prompts, before anything is computed."""
        if isinstance(call.others.get("custom_generate"), str):
            raise ValueError(
                "custom_generate from a repository would get the compact prompt: pass a callable, or no pruning."
            )
        if self._option(call, "cache_implementation") == "paged":
            raise ValueError("cache_implementation='paged' takes no images, so there is nothing to prune.")
        if self._option(call, "prefill_chunk_size") and not can_chunk_images():
            raise ValueError(
                "This version of transformers cannot split images over chunks: prefill_chunk_size needs a newer one."
            )
        copies = max(self._option(call, "num_beams", 1), self._option(call, "num_return_sequences", 1))
        self.family.check_generation(call, bool(self._option(call, "prefill_chunk_size")), copies)

    def _check_gaps(self, call: Call) -> None:
        """Refuse where stock would read positions with gaps as packed sequences."""
        if self._option(call, "use_cache") is False:
            raise ValueError(
                "Without a cache, stock generate drops a mask that hides nothing, and positions with gaps would be "
                "read as packed sequences: leave use_cache on, or keep_positions off."
            )
        if self._option(call, "prefill_chunk_size") and misreads_gaps(self):
            raise ValueError(
                "FlashAttention reads positions with gaps as packed sequences from the second chunk on: leave out "
                "prefill_chunk_size or keep_positions, or load with attn_implementation='sdpa'."
            )

    def _infer_attention_mask(self, call: Call, prompt: torch.Tensor) -> torch.Tensor:
        """As stock `generate` does: padding is told by its id, unless that also ends sequences."""
        pad, eos = self._option(call, "pad_token_id"), self._option(call, "eos_token_id", [])
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        if prompt.ndim == 2 and pad is not None and pad not in ends:
            return (prompt != pad).long()
        return torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)

    def _skip_cached_images(self, call: Call, seen: int) -> None:
        """If the prompt comes with the pixels of all its images, keep those beyond the cache only, where the family
        lets them be taken apart; elsewhere all are encoded again."""
        if seen == 0:
            return
        for modality in [m for m in MODALITIES if m in call.pixels and len(call.pixels[m])]:
            encode = getattr(self.model, f"get_{modality}_features")
            arguments = call.arguments_of_encoder(encode, modality)
            layouts = self.model.layouts(modality, **arguments)
            slots = {modality: self.placeholders(modality, call)}
            columns = PromptReading(None, call.prompt.shape[:2], slots).all_columns(modality)
            if layouts is None or sum(map(len, layouts)) != len(columns):
                continue  # the new images alone, or a mismatch, which prepare will name
            places = spans(columns, [len(layout) for layout in layouts], seen, modality)
            new = [index for index, (first, _) in enumerate(places) if first >= seen]
            selected = self.family.select(self.model, modality, arguments, new) if new else {}
            if selected is not None:
                call.replace_visual(modality, selected)

    def _prepend_cached(self, compact: Call, plan: PromptPlan, call: Call, seen: int) -> None:
        """Give compact ids and positions a cached part again: stock slices it off by the cache's length."""
        entries = torch.cat([plan.past.mask, torch.ones_like(plan.decoded)], dim=1)
        stood = torch.cat([plan.past.kept, torch.ones_like(plan.decoded)], dim=1)
        positions = compact.position_ids
        if positions is not None:
            before = positions.new_zeros(*positions.shape[:-2], *entries.shape)
            compact.position_ids = torch.cat([before, positions], dim=-1)
        # Bidirectional masks of image tokens read types by cache position.
        for name in [name for name in compact.along if name != "labels"]:
            values = compact.along[name]
            compact.along[name] = torch.cat([values.new_zeros(*entries.shape, *values.shape[2:]), values], dim=1)
        if seen and call.input_ids is not None and compact.input_ids is not None:
            before = torch.full_like(entries, self.padding_id(), dtype=call.input_ids.dtype)
            text = call.input_ids[:, :seen]
            text = text.masked_fill(self._any_placeholder(text), self.padding_id())
            before[entries] = text[stood]
            compact.input_ids = torch.cat([before, compact.input_ids], dim=1)
        if seen and call.inputs_embeds is not None and compact.inputs_embeds is not None:
            before = call.inputs_embeds.new_zeros(*entries.shape, call.inputs_embeds.shape[-1])
            compact.inputs_embeds = torch.cat([before, compact.inputs_embeds], dim=1)

    def _any_placeholder(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = [getattr(self.config, f"{modality}_token_id", None) for modality in MODALITIES]
        return torch.isin(ids, torch.tensor([token for token in tokens if token is not None]).to(ids))

    def _shift_lengths(self, compact: Call, length: int, compact_length: int) -> None:
        """`max_length` and `min_length` count the original prompt."""
        longest = self._option(compact, "max_length")
        if longest is not None and longest <= length and self._option(compact, "max_new_tokens") is None:
            raise ValueError(
                f"Input length of input_ids is {length}, but max_length is set to {longest}. Increase it, or set "
                "max_new_tokens."
            )
        for name in ("max_length", "min_length"):
            if (value := self._option(compact, name)) is not None:
                compact.others[name] = max(value - (length - compact_length), 0)

    def _show_original(self, compact: Call, ids: torch.Tensor, compact_length: int) -> None:
        """Let the user's own objects see sequences that begin with the original prompt."""
        options = compact.others
        for name in ("logits_processor", "stopping_criteria"):
            if options.get(name):
                options[name] = [_OnOriginal.wrap(item, ids, compact_length) for item in options[name]]
        if options.get("streamer") is not None:
            options["streamer"] = _OriginalStreamer(options["streamer"], ids)
        if (allowed := options.get("prefix_allowed_tokens_fn")) is not None:
            # Only beams share a batch_id; several sampled sequences have one each.
            beams, several = self._option(compact, "num_beams", 1), self._option(compact, "num_return_sequences", 1)
            copies = 1 if beams > 1 else several
            options["prefix_allowed_tokens_fn"] = lambda batch_id, sequence: allowed(
                batch_id, torch.cat([ids[batch_id // copies].to(sequence), sequence[compact_length:]])
            )

    def _merge_criteria_processor_list(self, default_list: list, custom_list: list) -> list:
        """A user's object replaces a default one of its type: decided on the object itself, not on our wrapper."""
        wrappers = {id(item.inner): item for item in custom_list if isinstance(item, _OnOriginal)}
        bare = type(custom_list)(item.inner if isinstance(item, _OnOriginal) else item for item in custom_list)
        merged = super()._merge_criteria_processor_list(default_list, bare)
        return type(merged)(wrappers.get(id(item), item) for item in merged)


def get_image_features(self, *args, pruning: PruningConfig | dict | None = None, **kwargs):
    """The headless model's, see there.

    Args:
        pruning ([`PruningConfig`] or `dict`, *optional*): settings for this call in place of the model's own.
    """
    arguments = bound(self.stock.get_image_features, self, args, kwargs)
    return self.stock.get_image_features(self, **arguments, pruning=pruning)  # which hands keywords on


def get_video_features(self, *args, pruning: PruningConfig | dict | None = None, **kwargs):
    """The headless model's, see there.

    Args:
        pruning ([`PruningConfig`] or `dict`, *optional*): settings for this call in place of the model's own.
    """
    arguments = bound(self.stock.get_video_features, self, args, kwargs)
    return self.stock.get_video_features(self, **arguments, pruning=pruning)


class _OnOriginal:
    """A logits processor or stopping criterion of the user's, shown the original prompt in place of the compact one."""

    def __init__(self, inner: Any, ids: torch.Tensor, compact_length: int):
        self.inner, self.ids, self.compact_length = inner, ids, compact_length

    @staticmethod
    def wrap(inner: Any, ids: torch.Tensor, compact_length: int) -> Any:
        return (_CriterionOnOriginal if isinstance(inner, StoppingCriteria) else _ProcessorOnOriginal)(
            inner, ids, compact_length
        )

    def restore(self, input_ids: torch.Tensor) -> torch.Tensor:
        return _with_prompt(input_ids, self.ids, self.compact_length)


class _ProcessorOnOriginal(_OnOriginal, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.inner(self.restore(input_ids), scores)


class _CriterionOnOriginal(_OnOriginal, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner(self.restore(input_ids), scores, **kwargs)


class _OriginalStreamer(BaseStreamer):
    """Stock `generate` streams the prompt first, then tokens."""

    def __init__(self, inner: Any, ids: torch.Tensor):
        self.inner = inner
        self.prompt: torch.Tensor | None = ids.cpu()

    def put(self, value: torch.Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt.repeat_interleave(len(value) // len(self.prompt), dim=0), None
        self.inner.put(value)

    def end(self) -> None:
        self.inner.end()


def _with_prompt(sequences: torch.Tensor, ids: torch.Tensor, compact_length: int) -> torch.Tensor:
    """Sequences that begin with the original `ids` `(batch, L)`, for rows that are multiples of the batch."""
    prompt = ids.to(sequences.device).repeat_interleave(len(sequences) // len(ids), dim=0)
    return torch.cat([prompt, sequences[:, compact_length:]], dim=1)
