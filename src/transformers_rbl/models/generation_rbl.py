"""`generate` on compact prompts, with stock-shaped answers.

The prompt loses the placeholders of dropped visual tokens before stock `generate` starts, so that every decoding mode
and cache runs as it is. What the user gives and gets speaks of the original prompt: sequences, lengths, processors,
streamers.
"""

import torch
from torch import nn
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import utils as generation_utils
from transformers.generation.streamers import BaseStreamer

from .codebook import RedundancyCodebook
from .modeling_rbl import MASKS, PIXELS, RBLMixin, forgotten, with_pruning, without_masks
from .prompt import CachedPrompt, PromptPlan
from .seam import CACHE, claim_cache


class RBLGenerationMixin(RBLMixin):
    """Full models: a headless RBL model inside, and `generate` on compact prompts with stock-shaped answers."""

    def __init_subclass__(cls, stock=None, headless=None, **kwargs):
        super().__init_subclass__(stock=stock, **kwargs)
        if stock is not None:
            cls.headless, cls.full, headless.full = headless, cls, cls
            cls.generate = with_pruning(stock.generate, RBLGenerationMixin._generate)
            for name in ("get_image_features", "get_video_features"):
                if hasattr(stock, name):
                    setattr(cls, name, with_pruning(getattr(stock, name), RBLGenerationMixin._get_features))

    def __init__(self, config):
        # Past the stock class's own __init__, which would build a stock headless model.
        super(self.stock, self).__init__(config)
        self.model = self.headless(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def codebook(self) -> RedundancyCodebook | None:
        return self.model.codebook

    def __setattr__(self, name, value):
        if name == "codebook":  # nn.Module would register a second one here, behind the property
            self.set_codebook(value)
        else:
            super().__setattr__(name, value)

    def _get_features(self, stock, call: dict, pruning):
        return stock(self, **call, pruning=pruning)  # stock hands its keyword arguments on to the headless model

    @torch.no_grad()
    def _generate(self, stock, call: dict, pruning):
        """Encode and compact before generation starts, let stock `generate` run on the compact prompt, then answer in
        terms of the original one: sequences, lengths, and whatever the user's own objects are shown."""
        cache = claim_cache(call)
        memory = CachedPrompt.of(cache)
        if memory is None and not self._prunes(call, pruning):
            return stock(self, **call)
        self._check_generation(call)

        if call.get("inputs") is not None:
            call["input_ids"] = call.pop("inputs")
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        prompt = embeds if embeds is not None else ids
        if prompt is None:
            raise ValueError("Pruning needs the prompt: pass input_ids (or inputs_embeds) beside the images.")
        if call.get("attention_mask") is None:
            call["attention_mask"] = self._infer_attention_mask(call, prompt)

        cached = 0 if cache is None else int(cache.get_seq_length())
        start = cached if memory is None else memory.original_length(cached)
        # As in stock: the full prompt, or what is new of it beside a mask for all.
        seen = start if prompt.shape[1] == call["attention_mask"].shape[-1] else 0
        if memory is not None:
            memory.check(len(prompt), ids if seen else None)
        if seen >= prompt.shape[1]:
            raise ValueError(
                f"The cache stands for {start} tokens already; a prompt of {prompt.shape[1]} adds none to answer."
            )
        if start > 0 and memory is None and call.get("position_ids") is None:
            call["position_ids"] = (call["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)

        self._skip_cached_images(call, ids, embeds, seen)
        features = self._encode(call, pruning)
        new = {name: call[name][:, seen:] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None}
        dropped = self._dropped(features, new.get("input_ids"), new.get("inputs_embeds"))
        call["mm_encoder_outputs"] = without_masks(features)
        plan = None
        if memory is not None or dropped.any():
            plan = PromptPlan(dropped, call["attention_mask"], start, memory)
            call.update(new)
            self._compact(call, plan)
            positions = call.get("position_ids")
            if cached > 0:
                self._prepend_cached(call, plan, ids, embeds, seen)
            compact_length = (call["input_ids"] if ids is not None else call["inputs_embeds"]).shape[1]
            self._shift_lengths(call, prompt.shape[1], compact_length)
            if ids is not None:
                self._show_original(call, ids, compact_length)

        with forgotten(cache):
            result = stock(self, **call)

        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        times = len(sequences) // len(prompt)
        if plan is not None and ids is not None:
            sequences = _with_prompt(sequences, ids, compact_length)
        if isinstance(result, torch.Tensor):
            result = sequences
        else:
            result.sequences, cache = sequences, result.get(CACHE, cache)
            for modality, key in MASKS.items():
                if key in features.get(modality, {}):
                    result[key] = features[modality][key]
            result["prompt_mask"] = call["attention_mask"][:, -dropped.shape[1] :].bool() if plan is None else plan.kept
        if plan is not None and cache is not None and not plan.kept.all():
            if positions is None:
                positions = plan.mask.long().cumsum(-1) - 1
            memory = plan.remember(ids if seen == start else None, positions)
            memory.repeat(times).attach(cache)
        elif memory is not None and cache is not None and times > 1:
            memory.repeat(times).attach(cache)
        return result

    def _option(self, call: dict, name: str, default=None):
        """A generation option, from wherever stock `generate` would read it."""
        configs = (call.get("generation_config"), self.generation_config)
        values = (call.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), default)

    def _check_generation(self, call: dict) -> None:
        """Refuse what cannot work on compact prompts, before anything is computed."""
        if isinstance(call.get("custom_generate"), str):
            raise ValueError(
                "custom_generate from a repository would get the compact prompt: pass a callable, or no pruning."
            )
        if self._option(call, "cache_implementation") == "paged":
            raise ValueError("cache_implementation='paged' takes no images, so there is nothing to prune.")
        # transformers 5.19 gives every chunk all image features, and a wrong answer without a word.
        if self._option(call, "prefill_chunk_size") and not hasattr(generation_utils, "_slice_mm_encoder_output"):
            raise ValueError(
                "This version of transformers cannot split images over chunks: prefill_chunk_size needs a newer one."
            )

    def _infer_attention_mask(self, call: dict, prompt: torch.Tensor) -> torch.Tensor:
        """As stock `generate` does: padding is told by its id, unless that also ends sequences."""
        pad, eos = self._option(call, "pad_token_id"), self._option(call, "eos_token_id", [])
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        if prompt.ndim == 2 and pad is not None and pad not in ends:
            return (prompt != pad).long()
        return torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)

    def _skip_cached_images(self, call: dict, ids, embeds, seen: int) -> None:
        """If the prompt comes with the pixels of all its images, keep those beyond the cache only."""
        if seen == 0:
            return
        for modality, pixels in PIXELS.items():
            if call.get(pixels) is None:
                continue
            counts = [len(kinds) for kinds in self.model.token_kinds(modality, **call)]
            columns = self._placeholders(modality, ids, embeds).nonzero()[:, 1]
            if sum(counts) != len(columns):
                continue  # the new images alone, or a mismatch, which _dropped will name
            first = torch.tensor([0, *counts[:-1]]).cumsum(0).to(columns.device)
            new = (columns[first] >= seen).nonzero()[:, 0].tolist()
            if any(columns[first[i]] < seen <= columns[first[i] + counts[i] - 1] for i in range(len(counts))):
                raise ValueError("The cache ends in the middle of an image or video: start with a new cache.")
            self.model._select(call, new, modality)

    def _prepend_cached(self, call: dict, plan: PromptPlan, ids, embeds, seen: int) -> None:
        """Give compact ids and positions a cached part again: stock slices it off by the cache's length."""
        entries = torch.cat([plan.past.mask, torch.ones_like(plan.decoded)], dim=1)
        stood = torch.cat([plan.past.kept, torch.ones_like(plan.decoded)], dim=1)
        call["position_ids"] = torch.cat([torch.zeros_like(entries, dtype=torch.long), call["position_ids"]], dim=1)
        if seen and ids is not None:
            before = torch.full_like(entries, self._padding_id(), dtype=ids.dtype)
            text = ids[:, :seen].masked_fill(self._any_placeholder(ids[:, :seen]), self._padding_id())
            before[entries] = text[stood]
            call["input_ids"] = torch.cat([before, call["input_ids"]], dim=1)
        if seen and embeds is not None:
            before = embeds.new_zeros(*entries.shape, embeds.shape[-1])
            call["inputs_embeds"] = torch.cat([before, call["inputs_embeds"]], dim=1)

    def _any_placeholder(self, ids: torch.Tensor) -> torch.Tensor:
        names = (f"{modality}_token_id" for modality in PIXELS)
        return torch.isin(
            ids, torch.tensor([getattr(self.config, n) for n in names if hasattr(self.config, n)]).to(ids)
        )

    def _shift_lengths(self, call: dict, length: int, compact_length: int) -> None:
        """`max_length` and `min_length` count the original prompt."""
        longest = self._option(call, "max_length")
        if longest is not None and longest <= length and self._option(call, "max_new_tokens") is None:
            raise ValueError(
                f"Input length of input_ids is {length}, but max_length is set to {longest}. Increase it, or set "
                "max_new_tokens."
            )
        for name in ("max_length", "min_length"):
            if (value := self._option(call, name)) is not None:
                call[name] = max(value - (length - compact_length), 0)

    def _show_original(self, call: dict, ids: torch.Tensor, compact_length: int) -> None:
        """Let the user's own objects see sequences that begin with the original prompt."""
        for name in ("logits_processor", "stopping_criteria"):
            if call.get(name):
                call[name] = [_OnOriginal.wrap(item, ids, compact_length) for item in call[name]]
        if call.get("streamer") is not None:
            call["streamer"] = _OriginalStreamer(call["streamer"], ids)
        if (allowed := call.get("prefix_allowed_tokens_fn")) is not None:
            # Only beams share a batch_id; several sampled sequences have one each.
            copies = 1 if self._option(call, "num_beams", 1) > 1 else self._option(call, "num_return_sequences", 1)
            call["prefix_allowed_tokens_fn"] = lambda batch_id, sequence: allowed(
                batch_id, torch.cat([ids[batch_id // copies].to(sequence), sequence[compact_length:]])
            )

    def _merge_criteria_processor_list(self, default_list, custom_list):
        """A user's object replaces a default one of its type: decided on the object itself, not on our wrapper."""
        wrappers = {id(item.inner): item for item in custom_list if isinstance(item, _OnOriginal)}
        bare = type(custom_list)(item.inner if isinstance(item, _OnOriginal) else item for item in custom_list)
        merged = super()._merge_criteria_processor_list(default_list, bare)
        return type(merged)(wrappers.get(id(item), item) for item in merged)


class _OnOriginal:
    """A logits processor or stopping criterion of the user's, shown the original prompt in place of the compact one."""

    def __init__(self, inner, ids: torch.Tensor, compact_length: int):
        self.inner, self.ids, self.compact_length = inner, ids, compact_length

    @staticmethod
    def wrap(inner, ids, compact_length):
        return (_CriterionOnOriginal if isinstance(inner, StoppingCriteria) else _ProcessorOnOriginal)(
            inner, ids, compact_length
        )

    def restore(self, input_ids: torch.Tensor) -> torch.Tensor:
        return _with_prompt(input_ids, self.ids, self.compact_length)


class _ProcessorOnOriginal(_OnOriginal, LogitsProcessor):
    def __call__(self, input_ids, scores):
        return self.inner(self.restore(input_ids), scores)


class _CriterionOnOriginal(_OnOriginal, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return self.inner(self.restore(input_ids), scores, **kwargs)


class _OriginalStreamer(BaseStreamer):
    """Stock `generate` streams the prompt first, then tokens."""

    def __init__(self, inner, ids: torch.Tensor):
        self.inner, self.prompt = inner, ids.cpu()

    def put(self, value):
        if self.prompt is not None:
            value, self.prompt = self.prompt.repeat_interleave(len(value) // len(self.prompt), dim=0), None
        self.inner.put(value)

    def end(self):
        self.inner.end()


def _with_prompt(sequences: torch.Tensor, ids: torch.Tensor, compact_length: int) -> torch.Tensor:
    """Sequences that begin with the original `ids` `(batch, L)`, for rows that are multiples of the batch."""
    prompt = ids.to(sequences.device).repeat_interleave(len(sequences) // len(ids), dim=0)
    return torch.cat([prompt, sequences[:, compact_length:]], dim=1)
