"""What the language model says of single visual tokens: the three experiments on one image (arXiv 2503.20540).

Single input: the prompt with one visual token. Local leave-one-out: its 3x3 neighbourhood, with it and without. Global
leave-one-out: all tokens, with the neighbourhood and without. One forward pass gives the first answer token's logits;
whatever two inputs share at their beginning is computed once and re-used from the KV cache.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

import torch
from PIL import Image
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.utils import logging

from ..models.families import cls_cosines
from ..models.seam import CACHE
from ..prompts import chat_prompt, placeholder
from .measures import answer_confidence, answer_divergence, neighbourhoods
from .recipe import CHOICES, Recipe
from .selection import Probe


logger = logging.get_logger(__name__)

ARTICLES = {"a", "an", "the"}
# Rows of the global experiment share a forward pass while recomputing what they share costs at most this share.
RECOMPUTED = 1 / 16
NUM_WORDS = 3

# Of every layer its keys and values `(rows, heads, n, width)`.
KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]


class Prober:
    """Probes images with a stock model (one of the three families; it never prunes).

    Args:
        model (`PreTrainedModel`): LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, in eval mode, of any dtype and placement.
        prefix_ids, suffix_ids (`list[int]`): the prompt before and after the visual tokens, see [`split_prompt`].
        recipe ([`Recipe`]): what to probe.
        article_ids (`Iterable[int]`): tokens that are a bare article, see [`article_tokens`].
        max_tokens_per_batch (`int`): tokens computed in one forward pass; halved, and said so, when memory runs out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix_ids: Sequence[int],
        suffix_ids: Sequence[int],
        recipe: Recipe,
        article_ids: Iterable[int] = (),
        max_tokens_per_batch: int = 8192,
    ):
        self.model, self.recipe, self.budget = model, recipe, max_tokens_per_batch
        self.headless = model.base_model
        self.vision_tower = self.headless.get_submodule("vision_tower")
        self.language_model = self.headless.get_submodule("language_model")
        self.lm_head = model.get_submodule("lm_head")
        self.embed = embed = model.get_input_embeddings()
        self.device = next(embed.parameters()).device
        self.articles = torch.tensor(sorted(article_ids), dtype=torch.long, device=self.device)
        with torch.no_grad():
            self.suffix = embed(torch.tensor(suffix_ids, device=self.device))
            self.prefix = self._cached(embed(torch.tensor([prefix_ids], device=self.device)))
            self.pad = embed(torch.tensor(pad_token_id(model, recipe), device=self.device))

    @torch.no_grad()
    def probe(self, image: str, pixel_values: torch.Tensor, decode: Callable[[int], str] = str) -> Probe:
        """All three experiments on one image.

        Args:
            image (`str`): its name, for the record.
            pixel_values (`torch.Tensor` of shape `(channels, height, width)`): the base image, see [`base_pixels`].
            decode (`Callable[[int], str]`): what a token id says.

        Raises:
            ValueError: if the image's tokens are no square grid, or the recipe's targets do not fit it.
        """
        tokens, similarity = self.encode(pixel_values)
        positions = self.recipe.target_positions(len(tokens), similarity)
        side = round(len(tokens) ** 0.5)
        if side * side != len(tokens):
            raise ValueError(f"An image has {len(tokens)} tokens, which is no square grid: its neighbours are unknown.")
        around = neighbourhoods(positions, side)

        alone = self.single_input(tokens, positions)
        best = alone.topk(NUM_WORDS, dim=-1).indices.tolist()
        return Probe(
            image=image,
            positions=positions,
            tokens=tokens[positions.to(tokens.device)].cpu(),
            p1=answer_confidence(alone, self.recipe.top_k_p1).cpu(),
            local=self._divergences(*self.local_leave_one_out(tokens, positions, around)),
            globally=self._divergences(*self.global_leave_one_out(tokens, around)),
            words=[[decode(token) for token in row] for row in best],
        )

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One base image's visual tokens `(n, d)`, and their cosines with [cls] `(n,)` where the tower has one."""
        weight = next(self.vision_tower.parameters())
        pixels = pixel_values[None].to(weight.device, weight.dtype)
        # By the code of LLaVA-1.5, which has no tiles and no row ends. Its decorator takes return_dict.
        outputs = LlavaModel.get_image_features(cast(LlavaModel, self.headless), pixels, return_dict=True)  # pyright: ignore[reportCallIssue]
        config = self.model.config
        tokens = outputs.pooler_output[0].to(self.device)
        grid = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        cosines = cls_cosines(outputs.hidden_states, config.vision_feature_layer)[0, :, 0]
        has_cls = len(cosines) == grid + 1
        return tokens, cosines[-len(tokens) :] if has_cls else None

    def single_input(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits `(T, vocabulary)` of the first answer token, for each target shown alone."""
        return self._answers(tokens[positions.to(tokens.device)][:, None])

    def local_leave_one_out(
        self, tokens: torch.Tensor, positions: torch.Tensor, around: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(T, vocabulary)` with the target among its neighbours `(T, 9)`, and without it."""
        around, positions = around.to(tokens.device), positions.to(tokens.device)
        neighbours, target = tokens[around], around == positions[:, None]
        return self._answers(neighbours), self._answers(self._without(neighbours, target, tokens))

    def global_leave_one_out(self, tokens: torch.Tensor, around: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(T, vocabulary)` of the whole image (the same for each target), and without each neighbourhood."""
        past = self._cached(tokens[None], self.prefix)
        unchanged = self._answers(tokens[None, :0], past)
        length = len(tokens) - (around.shape[1] if self.recipe.replacement == "remove" else 0)
        first = around.amin(dim=1)  # tokens before it are those of the whole image
        order = first.argsort(stable=True)
        starts = first[order].tolist()
        prefix_length = self.prefix[0][0].shape[2]
        logits = torch.empty(len(around), unchanged.shape[1], device=unchanged.device)
        done = 0
        while done < len(order):
            rows = self._rows_from(starts, done, length - starts[done] + len(self.suffix), length)
            chosen = order[done : done + rows]

            def run(rows: int = rows, chosen: torch.Tensor = chosen, start: int = starts[done]) -> torch.Tensor:
                gone = torch.zeros(rows, len(tokens), dtype=torch.bool)
                gone.scatter_(1, around[chosen], True)
                changed = self._without(tokens.expand(rows, -1, -1), gone.to(tokens.device), tokens)
                end = prefix_length + start
                before = [(keys[:, :, :end], values[:, :, :end]) for keys, values in past]
                return self._answer(changed[:, start:], before)

            answer = self._within_memory(run, rows)
            if answer is None:
                continue
            logits[chosen.to(logits.device)] = answer
            done += rows
        return unchanged.expand(len(around), -1), logits

    def _rows_from(self, starts: list[int], done: int, per_row: int, length: int) -> int:
        """How many targets, sorted by their first changed token, share one forward pass from the earliest one's on."""
        needed = wasted = rows = 0
        for start in starts[done:]:
            needed, wasted = needed + length - start + len(self.suffix), wasted + start - starts[done]
            if rows and (wasted > RECOMPUTED * needed or (rows + 1) * per_row > self.budget):
                break
            rows += 1
        return rows

    def _without(self, tokens: torch.Tensor, gone: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """`tokens` `(T, n, d)` with those `gone` `(T, n)` replaced, or removed (as many in each row)."""
        if self.recipe.replacement == "remove":
            return tokens[~gone].view(len(tokens), -1, tokens.shape[-1])
        filler = self.pad if self.recipe.replacement == "pad" else image.float().mean(dim=0)
        return torch.where(gone[..., None], filler.to(tokens.dtype), tokens)

    def _divergences(self, logits: torch.Tensor, changed: torch.Tensor) -> dict[str, torch.Tensor]:
        top_k = self.recipe.top_k_divergence
        return {kind: answer_divergence(logits, changed, top_k, kind).cpu() for kind in CHOICES["divergence"]}

    def _answers(self, visual: torch.Tensor, past: KeysAndValues | None = None) -> torch.Tensor:
        """Logits `(T, vocabulary)` of the first answer token after each row of `visual` `(T, n, d)`, in batches; `past`
        is the prompt up to there, by default its beginning."""
        past = self.prefix if past is None else past
        logits, done = [], 0
        while done < len(visual):
            rows = max(1, self.budget // (visual.shape[1] + len(self.suffix)))
            part = visual[done : done + rows]
            answer = self._within_memory(partial(self._answer, part, past), len(part))
            if answer is None:
                continue
            logits.append(answer)
            done += len(part)
        return torch.cat(logits)

    def _answer(self, visual: torch.Tensor, past: KeysAndValues) -> torch.Tensor:
        """One forward pass, and one more token for rows whose answer begins with a bare article."""
        embeds = torch.cat([visual, self.suffix.to(visual.dtype).expand(len(visual), -1, -1)], dim=1)
        logits, cache = self._forward(embeds, past)
        rows = torch.arange(len(visual), device=logits.device)
        for _ in range(self.recipe.skip_articles):
            begun = torch.isin(logits[rows].argmax(-1), self.articles.to(logits.device))
            if not begun.any():
                break
            rows = rows[begun]
            past = [(keys[begun.to(keys.device)], values[begun.to(values.device)]) for keys, values in _layers(cache)]
            article = self.embed(logits[rows].argmax(-1).to(self.device))
            logits[rows], cache = self._forward(article[:, None], past)
        return logits

    def _forward(self, embeds: torch.Tensor, past: KeysAndValues) -> tuple[torch.Tensor, Cache]:
        """Next-token logits `(T, vocabulary)` float32 after `embeds` `(T, n, d)`, which follow `past`, with one row for
        all or one each."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        for index, (keys, values) in enumerate(past):
            cache.update(keys.expand(len(embeds), -1, -1, -1), values.expand(len(embeds), -1, -1, -1), index)
        output = self.language_model(inputs_embeds=embeds, **{CACHE: cache}, use_cache=True)
        return self.lm_head(output.last_hidden_state[:, -1]).float(), output[CACHE]

    def _cached(self, embeds: torch.Tensor, past: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()) -> KeysAndValues:
        """Keys and values of every layer after `past` and `embeds` `(1, n, d)`."""
        _, cache = self._forward(embeds, list(past))
        length = embeds.shape[1] + (past[0][0].shape[2] if past else 0)
        layers = _layers(cache)
        if any(keys.shape[2] != length for keys, _ in layers):
            raise ValueError("This language model's attention window is shorter than the prompt: it cannot be probed.")
        return layers

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


def split_prompt(processor: ProcessorMixin, prompt: str) -> tuple[list[int], list[int]]:
    """Token ids before and after the image, of a prompt in the checkpoint's own chat template.

    Args:
        processor (`ProcessorMixin`): the checkpoint's.
        prompt (`str`): the question about the image, which comes first.

    Raises:
        ValueError: if the prompt does not have one image token.
    """
    tokenizer = tokenizer_of(processor)
    ids = list(tokenizer(chat_prompt(processor, [{"type": "image"}, {"type": "text", "text": prompt}]))["input_ids"])
    image_id = tokenizer.convert_tokens_to_ids(placeholder(processor, "image"))
    if ids.count(image_id) != 1:
        raise ValueError(f"The chat template puts {ids.count(image_id)} image tokens into a prompt about one image.")
    place = ids.index(image_id)
    return ids[:place], ids[place + 1 :]


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """A processor's tokenizer, an attribute that its class does not declare."""
    return processor.tokenizer


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


def base_pixels(processor: ProcessorMixin, image: Image.Image) -> torch.Tensor:
    """The base image's pixels `(channels, height, width)`, as the checkpoint's processor makes them."""
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    return pixels[0] if pixels.ndim == 4 else pixels


def is_supported(model: PreTrainedModel) -> bool:
    """Whether a model has the parts that probing calls, those of the LLaVA families."""
    return hasattr(model, "lm_head") and all(
        hasattr(model.base_model, name) for name in ("vision_tower", "multi_modal_projector", "language_model")
    )


def _layers(cache: Cache) -> KeysAndValues:
    """What a cache holds.

    Raises:
        ValueError: if a layer holds anything but keys and values, as linear attention does.
    """
    layers: KeysAndValues = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin) or layer.keys is None or layer.values is None:
            raise ValueError("This language model caches something else than keys and values: it cannot be probed.")
        layers.append((layer.keys, layer.values))
    return layers
