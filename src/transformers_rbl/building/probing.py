"""What the language model says of single visual tokens: the three experiments on one image (arXiv 2503.20540).

Single input: the prompt with one visual token. Local leave-one-out: its 3x3 neighbourhood, with it and without. Global
leave-one-out: all tokens, with the neighbourhood and without. One forward pass gives the first answer token's logits.
Whatever two inputs share at their beginning is computed once and re-used from the KV cache, where the cache can be cut;
it is recomputed for layers with a state or a short window, and for image tokens that attend to what follows them.

A token that is shown keeps its position where positions have three dimensions, and the text after the image stands
where the whole prompt has it. Text between the image's rows is shown with the whole image only.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from ..models.seam import ASIDE, CACHE
from .measures import answer_confidence, answer_divergence, neighbourhoods
from .recipe import CHOICES, Recipe
from .selection import Probe
from .showing import (  # noqa: F401  (some were here in 0.1.0)
    Shown,
    base_pixels,
    family_of,
    features_of,
    is_supported,
    split_prompt,
    tokenizer_of,
    why_not,
)


logger = logging.get_logger(__name__)

ARTICLES = {"a", "an", "the"}
# Rows of the global experiment share a forward pass while recomputing what they share costs at most this share.
RECOMPUTED = 1 / 16
NUM_WORDS = 3

# Of every layer its keys and values `(rows, heads, n, width)`.
KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Asked:
    """Prompts of one length, a row each, with as many visual tokens in every row.

    Args:
        shown ([`Shown`]): the image.
        ids (`torch.LongTensor` of shape `(T, m)`), slots (`torch.BoolTensor` of shape `(T, m)`): tokens, and which of
            them are placeholders.
        tokens (`torch.Tensor` of shape `(T, k, d)`), views (`dict[str, list[torch.Tensor]]`): what stands there.
        positions (`torch.LongTensor` of shape `(3, T, m)`, *optional*), types (`dict[str, torch.LongTensor]`): along
            the prompt.
    """

    shown: Shown
    ids: torch.Tensor
    slots: torch.Tensor
    tokens: torch.Tensor
    views: dict[str, list[torch.Tensor]]
    positions: torch.Tensor | None
    types: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, chosen: Any) -> Asked:
        """Some of the rows."""
        return replace(
            self,
            ids=self.ids[chosen],
            slots=self.slots[chosen],
            tokens=self.tokens[chosen],
            views={name: [view[chosen] for view in views] for name, views in self.views.items()},
            positions=None if self.positions is None else self.positions[:, chosen],
            types={name: values[chosen] for name, values in self.types.items()},
        )

    def columns(self, first: int, end: int | None = None) -> Asked:
        """Some columns, which hold the same placeholders in every row."""
        past = int(self.slots[0, :first].sum())
        visual = slice(past, past + int(self.slots[0, first:end].sum()))
        return replace(
            self,
            ids=self.ids[:, first:end],
            slots=self.slots[:, first:end],
            tokens=self.tokens[:, visual],
            views={name: [view[:, visual] for view in views] for name, views in self.views.items()},
            positions=None if self.positions is None else self.positions[..., first:end],
            types={name: values[:, first:end] for name, values in self.types.items()},
        )

    def followed_by(self, ids: torch.Tensor) -> Asked:
        """With one more token of text `(T,)` in each row."""
        positions = self.positions
        if positions is not None:
            upcoming = positions.amax((0, 2))[None, :, None] + 1
            positions = torch.cat([positions, upcoming.expand(3, -1, -1)], dim=-1)
        return replace(
            self,
            ids=torch.cat([self.ids, ids.to(self.ids)[:, None]], dim=1),
            slots=torch.nn.functional.pad(self.slots, (0, 1)),
            positions=positions,
            types={name: torch.nn.functional.pad(values, (0, 1)) for name, values in self.types.items()},
        )


class Prober:
    """Probes images with a stock model of any family in [`FAMILIES`] (it never prunes).

    Args:
        model (`PreTrainedModel`): a full model, in eval mode, of any dtype and placement.
        recipe ([`Recipe`]): what to probe.
        article_ids (`Iterable[int]`): tokens that are a bare article, see [`article_tokens`].
        max_tokens_per_batch (`int`): tokens computed in one forward pass; halved, and said so, when memory runs out.

    Raises:
        ValueError: for a model that cannot be probed, see [`why_not`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        article_ids: Iterable[int] = (),
        max_tokens_per_batch: int = 8192,
    ):
        family = family_of(model)
        if family is None or (reason := why_not(model)) is not None:
            raise ValueError(why_not(model) if family is None else reason)
        self.model, self.family, self.recipe, self.budget = model, family, recipe, max_tokens_per_batch
        embed = model.get_input_embeddings()
        self.device = next(embed.parameters()).device
        self.articles = torch.tensor(sorted(article_ids), dtype=torch.long, device=self.device)
        self.prefix: tuple[list[int], KeysAndValues] | None = None
        with torch.no_grad():
            self.pad = embed(torch.tensor(pad_token_id(model, recipe), device=self.device))

    @torch.no_grad()
    def probe(self, image: str, shown: Shown, decode: Callable[[int], str] = str) -> Probe:
        """All three experiments on one image.

        Args:
            image (`str`): its name, for the record.
            shown ([`Shown`]): the image and the prompt about it.
            decode (`Callable[[int], str]`): what a token id says.

        Raises:
            ValueError: if the recipe's targets do not fit the image.
        """
        positions = self.recipe.target_positions(len(shown.tokens), shown.cls_similarity)
        around = neighbourhoods(positions, shown.grid)
        alone = self.single_input(shown, positions)
        best = alone.topk(NUM_WORDS, dim=-1).indices.tolist()
        return Probe(
            image=image,
            positions=positions,
            tokens=shown.tokens[positions.to(shown.tokens.device)].cpu(),
            p1=answer_confidence(alone, self.recipe.top_k_p1).cpu(),
            local=self._divergences(*self.local_leave_one_out(shown, positions, around)),
            globally=self._divergences(*self.global_leave_one_out(shown, around)),
            words=[[decode(token) for token in row] for row in best],
            grid=shown.grid,
        )

    def single_input(self, shown: Shown, positions: torch.Tensor) -> torch.Tensor:
        """Logits `(T, vocabulary)` of the first answer token, for each target shown alone."""
        return self._few(shown, positions[:, None], torch.zeros(len(positions), 1, dtype=torch.bool))

    def local_leave_one_out(
        self, shown: Shown, positions: torch.Tensor, around: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(T, vocabulary)` with the target among its neighbours `(T, 9)`, and without it."""
        target = around == positions[:, None]
        return self._few(shown, around, torch.zeros_like(target)), self._few(shown, around, target)

    def global_leave_one_out(self, shown: Shown, around: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(T, vocabulary)` of the whole image (the same for each target), and without each neighbourhood."""
        places = shown.slots.nonzero()[:, 0].tolist()
        whole = self._asked(shown, torch.arange(len(shown.ids))[None], torch.zeros(1, len(shown.tokens)).bool())
        end, past = places[-1] + 1, None
        if self._can_share(shown):
            past = self._cached(whole.columns(places[0], end), self._prefix(shown, places[0]))
        unchanged = self._answers(whole, past, end if past else 0)
        length = len(shown.ids) - (around.shape[1] if self.recipe.replacement == "remove" else 0)
        # Tokens before the first changed one are those of the whole image.
        first = around.amin(dim=1)
        order = first.argsort(stable=True)
        starts = [places[token] if past else 0 for token in first[order].tolist()]
        logits = torch.empty(len(around), unchanged.shape[1], device=unchanged.device)
        done = 0
        while done < len(order):
            rows = self._rows_from(starts, done, length)
            chosen, start = order[done : done + rows], starts[done]
            gone = torch.zeros(rows, len(shown.tokens), dtype=torch.bool).scatter_(1, around[chosen], True)
            asked = self._asked(shown, torch.arange(len(shown.ids)).expand(rows, -1), gone).columns(start)
            before = [(keys[:, :, :start], values[:, :, :start]) for keys, values in past or ()]
            answer = self._within_memory(partial(self._answer, asked, before), rows)
            if answer is None:
                continue
            logits[chosen.to(logits.device)] = answer
            done += rows
        return unchanged.expand(len(around), -1), logits

    def _rows_from(self, starts: list[int], done: int, length: int) -> int:
        """How many targets, sorted by their first changed column, share one forward pass from the earliest one's on."""
        per_row = length - starts[done]
        needed = wasted = rows = 0
        for start in starts[done:]:
            needed, wasted = needed + length - start, wasted + start - starts[done]
            if rows and (wasted > RECOMPUTED * needed or (rows + 1) * per_row > self.budget):
                break
            rows += 1
        return rows

    def _few(self, shown: Shown, visible: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
        """Logits `(T, vocabulary)` for some tokens `(T, k)` alone in the prompt, those `gone` `(T, k)` left out."""
        places = shown.slots.nonzero()[:, 0].cpu()
        before, after = torch.arange(int(places[0])), torch.arange(int(places[-1]) + 1, len(shown.ids))
        rows = len(visible)
        columns = torch.cat([before.expand(rows, -1), places[visible], after.expand(rows, -1)], dim=1)
        asked = self._asked(shown, columns, gone)
        past = self._prefix(shown, len(before)) if self._can_share(shown) else None
        return self._answers(asked, past, len(before) if past else 0)

    def _asked(self, shown: Shown, columns: torch.Tensor, gone: torch.Tensor) -> Asked:
        """Prompts of these columns `(T, m)`, of whose placeholders those `gone` `(T, k)` are replaced, or removed (as
        many in each row)."""
        slots = shown.slots.cpu()
        visible = (slots.cumsum(0) - 1)[columns[slots[columns]].view(gone.shape)]
        if self.recipe.replacement == "remove":
            stays = torch.ones_like(columns, dtype=torch.bool).masked_scatter_(slots[columns], ~gone)
            columns, visible = columns[stays].view(len(gone), -1), visible[~gone].view(len(gone), -1)
            gone = torch.zeros_like(visible, dtype=torch.bool)
        columns, visible, gone = (part.to(self.device) for part in (columns, visible, gone))

        def standing(values: torch.Tensor, filler: torch.Tensor) -> torch.Tensor:
            return torch.where(gone[..., None], filler.to(values), values[visible]) if gone.any() else values[visible]

        is_pad = self.recipe.replacement == "pad"
        fillers = {
            name: [_filler(view, torch.zeros_like(view[0]) if is_pad else None) for view in views]
            for name, views in shown.views.items()
        }
        return Asked(
            shown,
            ids=shown.ids[columns],
            slots=shown.slots[columns],
            tokens=standing(shown.tokens, _filler(shown.tokens, self.pad if is_pad else None)),
            views={name: list(map(standing, views, fillers[name])) for name, views in shown.views.items()},
            positions=None if shown.positions is None else shown.positions[:, columns],
            types={name: values[columns] for name, values in shown.types.items()},
        )

    def _divergences(self, logits: torch.Tensor, changed: torch.Tensor) -> dict[str, torch.Tensor]:
        top_k = self.recipe.top_k_divergence
        return {kind: answer_divergence(logits, changed, top_k, kind).cpu() for kind in CHOICES["divergence"]}

    def _answers(self, asked: Asked, past: KeysAndValues | None, seen: int) -> torch.Tensor:
        """Logits `(T, vocabulary)` of the first answer token to each row, in batches; `past` holds `seen` columns."""
        asked = asked.columns(seen)
        logits, done = [], 0
        while done < len(asked):
            part = asked.rows(slice(done, done + max(1, self.budget // asked.ids.shape[1])))
            answer = self._within_memory(partial(self._answer, part, past or []), len(part))
            if answer is None:
                continue
            logits.append(answer)
            done += len(part)
        return torch.cat(logits)

    def _answer(self, asked: Asked, past: KeysAndValues) -> torch.Tensor:
        """One forward pass, and one more token for rows whose answer begins with a bare article."""
        goes_on = self._can_cut(asked.shown)  # else what follows is computed with all that it follows
        logits, cache = self._forward(asked, past, keep=goes_on and self.recipe.skip_articles > 0)
        rows = torch.arange(len(asked), device=logits.device)
        for _ in range(self.recipe.skip_articles):
            begun = torch.isin(logits[rows].argmax(-1), self.articles.to(logits.device))
            if not begun.any():
                break
            rows, chosen = rows[begun], begun.to(self.device)
            asked = asked.rows(chosen).followed_by(logits[rows].argmax(-1))
            if goes_on:
                past = [
                    (keys[begun.to(keys.device)], values[begun.to(values.device)]) for keys, values in _layers(cache)
                ]
            new = asked.columns(asked.ids.shape[1] - 1) if goes_on else asked
            logits[rows], cache = self._forward(new, past, keep=goes_on)
        return logits

    def _forward(self, asked: Asked, past: KeysAndValues, keep: bool) -> tuple[torch.Tensor, Cache | None]:
        """Next-token logits `(T, vocabulary)` float32 after prompts that follow `past`, with one row for all or one
        each; and the cache, to `keep`."""
        arguments: dict[str, Any] = {"input_ids": asked.ids, "use_cache": keep or bool(past), "logits_to_keep": 1}
        if past or keep:
            arguments[CACHE] = cache = DynamicCache(config=self.model.config.get_text_config())
            for index, (keys, values) in enumerate(past):
                cache.update(keys.expand(len(asked), -1, -1, -1), values.expand(len(asked), -1, -1, -1), index)
        if asked.tokens.shape[1]:
            views = {name: [view.flatten(0, 1) for view in views] for name, views in asked.views.items()}
            features = features_of(self.family, asked.shown, asked.tokens.flatten(0, 1), views)
            arguments["mm_encoder_outputs"] = {"image": features}
        if asked.positions is not None:
            arguments["position_ids"] = asked.positions
        output = self.model(**arguments, **asked.types)
        return output.logits[:, -1].float(), output[CACHE] if keep else None

    def _can_share(self, shown: Shown) -> bool:
        """Whether the cache of a prompt's beginning serves every prompt that begins so.

        Not where tokens see what follows them: those of images that have types, or all (PaliGemma). And not where the
        prompt's beginning holds marks that stock replaces only beside an image (Ovis2).
        """
        sees_ahead = getattr(self.model.config.get_text_config(), "use_bidirectional_attention", None) in (True, "all")
        sees_ahead |= bool(shown.types) and shown.positions is None
        return not sees_ahead and not any(name in shown.encoded for name in ASIDE) and self._can_cut(shown)

    def _can_cut(self, shown: Shown) -> bool:
        """Whether every layer of the cache holds keys and values of the whole prompt, so that it can be taken apart."""
        longest = len(shown.ids) + self.recipe.skip_articles
        for layer in DynamicCache(config=self.model.config.get_text_config()).layers:
            if type(layer) is DynamicSlidingWindowLayer:
                if layer.sliding_window <= longest:
                    return False
            elif type(layer) is not DynamicLayer:
                return False
        return True

    def _prefix(self, shown: Shown, length: int) -> KeysAndValues:
        """Keys and values of the prompt before the image, which is the same for all images."""
        ids = shown.ids[:length].tolist()
        if self.prefix is None or self.prefix[0] != ids:
            whole = self._asked(shown, torch.arange(length)[None], torch.zeros(1, 0, dtype=torch.bool))
            self.prefix = ids, self._cached(whole, [])
        return self.prefix[1]

    def _cached(self, asked: Asked, past: KeysAndValues) -> KeysAndValues:
        """Keys and values of every layer after `past` and one prompt."""
        if not asked.ids.shape[1]:
            return past
        _, cache = self._forward(asked, past, keep=True)
        return _layers(cache)

    def _within_memory(self, run: Callable[[], torch.Tensor], rows: int) -> torch.Tensor | None:
        """`run()`, or None after memory ran out and the budget was halved."""
        try:
            return run()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            exhausted = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if not exhausted or rows == 1:
                raise
        self.budget //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(f"Out of memory: going on with max_tokens_per_batch={self.budget}.")
        return None


def article_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of tokens that are a bare article, with or without a space."""
    vocabulary = tokenizer.get_vocab()
    marks = "▁Ġ" + string.whitespace
    return sorted(index for token, index in vocabulary.items() if token.strip(marks).lower() in ARTICLES)


def pad_token_id(model: PreTrainedModel, recipe: Recipe) -> int:
    """The token whose word embedding stands for a left-out token.

    Raises:
        ValueError: if it is beyond the model's vocabulary.
    """
    config = model.config
    candidates = (recipe.pad_token_id, config.get_text_config().pad_token_id, getattr(config, "pad_token_id", None), 0)
    pad = next(token for token in candidates if token is not None)
    vocabulary = len(next(model.get_input_embeddings().parameters()))
    if pad >= vocabulary:
        raise ValueError(f"pad_token_id {pad} is beyond this model's vocabulary of {vocabulary}.")
    return pad


def _filler(values: torch.Tensor, constant: torch.Tensor | None) -> torch.Tensor:
    """What a left-out row of `values` `(n, d)` becomes: a constant, by default their mean."""
    return values.float().mean(dim=0) if constant is None else constant


def _layers(cache: Cache | None) -> KeysAndValues:
    """What a cache holds.

    Raises:
        ValueError: if a layer holds anything but keys and values.
    """
    layers: KeysAndValues = []
    for layer in [] if cache is None else cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise ValueError("This language model caches something else than keys and values: it cannot be probed.")
        layers.append((keys, values))
    return layers
