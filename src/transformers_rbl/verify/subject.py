"""What is verified: a pruned model beside its stock class, and what several contracts compute once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image, ImageOps

from ..evaluation.evaluate import prompt_text
from ..inputs import image_arguments, image_runs, split_inputs
from ..models.pruning import PruningConfig
from ..models.seam import ALONG, TOKENS, VIEWS, cache_of, read_by_stock, replaced


OFF, ALL = PruningConfig(enabled=False), PruningConfig(keep_ratio=1.0)
NEW_TOKENS = 4
# Of the largest logit. The same sums in another order differ by this much at most over the depth of a large model.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
QUESTION = "What is shown in this picture?"
LONGER_QUESTION = "Compare the second picture with the first one: what is the same, and what is not?"
NEXT_TURN = " And why do you think so?"


class Broken(Exception):
    """A contract does not hold."""


class Skipped(Exception):
    """A contract cannot be checked here."""


@dataclass
class Decoded:
    """A greedy answer: `ids` `(batch, n)`, the `logits` `(batch, n, vocabulary)` they were chosen by, `sequences`
    with the prompt, and the `cache`."""

    ids: torch.Tensor
    logits: torch.Tensor
    sequences: torch.Tensor
    cache: Any


@dataclass
class Subject:
    """What the contracts are checked on, and every pass that more than one of them reads.

    Args:
        model: the pruned model.
        stock: the stock class on the same weights, see [`stock_twin`].
        processor: the checkpoint's.
        image (`PIL.Image.Image`): the picture.
        pruning ([`PruningConfig`]): a keep ratio.
        loading_info (`dict`, *optional*): of `from_pretrained`.
    """

    model: Any
    stock: Any
    processor: Any
    image: Image.Image
    pruning: PruningConfig
    loading_info: Mapping[str, Any] | None = None

    @cached_property
    def prompt(self) -> Any:
        """One picture and a question."""
        return self._encoded([([self.image], QUESTION)])

    @cached_property
    def longer_prompt(self) -> Any:
        """Two pictures of other shapes and a longer question."""
        return self._encoded([self._two_pictures])

    @cached_property
    def batch(self) -> Any:
        """Both, the shorter one padded at the left."""
        if getattr(self.processor.tokenizer, "pad_token", None) is None:
            raise Skipped("the tokenizer has no padding token, so the checkpoint takes no batches")
        return self._encoded([([self.image], QUESTION), self._two_pictures])

    @property
    def _two_pictures(self) -> tuple[list[Image.Image], str]:
        return [self.image.rotate(90, expand=True), ImageOps.mirror(self.image)], LONGER_QUESTION

    def _encoded(self, prompts: list[tuple[list[Image.Image], str]]) -> Any:
        padding = {"padding": True, "padding_side": "left"} if len(prompts) > 1 else {}
        return self.processor(
            images=[pictures for pictures, _ in prompts],
            text=[prompt_text(self.processor, question, len(pictures)) for pictures, question in prompts],
            return_tensors="pt",
            **padding,
        ).to(self.model.device, self.model.dtype)

    @cached_property
    def encoded(self) -> Any:
        """The picture as the stock class encodes it."""
        return self.stock.base_model.get_image_features(**image_arguments(self.stock, self.prompt), return_dict=True)

    @cached_property
    def features(self) -> list[torch.Tensor]:
        """The picture's visual tokens `(L, d)`: one entry, or one a tile where they are scored apart."""
        family, config = self.model.family, self.model.config
        runs = image_runs(self.stock, self.prompt["input_ids"])
        return family.grouped(family.split(config, list(self.encoded[TOKENS])), [runs])

    @cached_property
    def patches(self) -> list[torch.Tensor]:
        """`(L,)` bool: which of them are scored. Row ends are not, and all of them are the same learnt embedding."""
        newline = getattr(self.stock.base_model, "image_newline", None)
        return [
            torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
            if newline is None
            else (tokens != newline.to(tokens)).any(-1)
            for tokens in self.features
        ]

    @cached_property
    def kept(self) -> torch.Tensor:
        """`(L,)` bool: positions of the prompt that stay, by the masks that the pruned model returned."""
        slots = self.prompt["input_ids"][0] == self.model.config.image_token_id
        kept = ~slots
        kept[slots] = torch.cat(list(self.output.keep_masks)).to(kept.device)
        return kept

    @cached_property
    def by_hand(self) -> dict[str, Any]:
        """The compact prompt put together by hand: what stock takes of the text and the kept tokens alone."""
        along, visual = split_inputs(self.prompt)
        compact: dict[str, Any] = {name: values[:, self.kept] for name, values in along.items()}
        rope = getattr(self.stock.base_model, "get_rope_index", None)
        if rope is not None:  # a token stays where it lies in its picture, and text where the whole prompt has it
            asked = inspect.signature(rope).parameters
            positions, _ = rope(**{name: value for name, value in {**along, **visual}.items() if name in asked})
            compact["position_ids"] = positions[..., self.kept]
        elif self.pruning.keep_positions:
            compact["position_ids"] = self.kept.nonzero().T
        parts: dict[str, Any] = {TOKENS: self.model.family.joined("image", [self._stay(self.features)])}
        for name in VIEWS:
            if self.encoded.get(name) is not None:
                parts[name] = [[self._stay(view)] for view in self.encoded[name]]
        compact["mm_encoder_outputs"] = {"image": replaced(read_by_stock(self.encoded), **parts)}
        return compact

    def _stay(self, view: Sequence[torch.Tensor]) -> torch.Tensor:
        """`(kept, d)`: what stays of the picture's tokens, or of another view of them: the kept ones, or, merged to the
        nearest, the means of those that come to each."""
        if self.pruning.merges and self.pruning.merge != "nearest":
            raise Skipped(f"score={self.pruning.score!r} merges by a rule of its own, which is not written out here")
        stay = []
        together = torch.cat(list(view)).split([len(tokens) for tokens in self.features])
        for tokens, patches, mask, own in zip(self.features, self.patches, self.output.keep_masks, together):
            kept, gone = (mask & patches).nonzero()[:, 0], (~mask & patches).nonzero()[:, 0]
            become = own.float()
            if self.pruning.merge == "nearest" and len(gone):
                unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
                nearest = (unit[gone] @ unit[kept].T).argmax(1)
                for place, token in enumerate(kept.tolist()):
                    group = torch.cat([kept[place : place + 1], gone[nearest == place]])
                    become[token] = own[group].float().mean(0)
            stay.append(become[mask].to(own.dtype))
        return torch.cat(stay)

    @cached_property
    def stock_logits(self) -> torch.Tensor:
        return self.stock(**self.prompt, use_cache=False).logits

    @cached_property
    def stock_answer(self) -> Decoded:
        return self.decode(self.stock, self.prompt)

    @cached_property
    def output(self) -> Any:
        """Of the pruned model's `forward`."""
        return self.model(**self.prompt, use_cache=True, pruning=self.pruning)

    @cached_property
    def answer(self) -> Decoded:
        return self.decode(self.model, self.prompt, pruning=self.pruning)

    @cached_property
    def answers(self) -> Decoded:
        """To the batch."""
        return self.decode(self.model, self.batch, pruning=self.pruning)

    @cached_property
    def next_turn(self) -> dict[str, torch.Tensor]:
        """Ids and mask of a second turn after `answers`, the first one included."""
        words = self.processor.tokenizer(NEXT_TURN, return_tensors="pt", add_special_tokens=False)["input_ids"]
        first = self.answers.sequences
        ids = torch.cat([first, words.to(first).expand(len(first), -1)], dim=1)
        mask = self.batch["attention_mask"]
        return {
            "input_ids": ids,
            "attention_mask": torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1),
        }

    @cached_property
    def started_over(self) -> Decoded:
        """The second turn without a cache."""
        again = {**self.batch, **self.next_turn}
        for name in ALONG:  # what else runs along the prompt is of text alone from here on
            if name in again:
                missing = again["input_ids"].shape[1] - again[name].shape[1]
                again[name] = torch.nn.functional.pad(again[name], (0, missing))
        return self.decode(self.model, again, pruning=self.pruning)

    def decode(self, model: Any, inputs: Mapping[str, Any], **kwargs: Any) -> Decoded:
        """A few tokens, greedily. Special tokens are suppressed: an answer must not end early, nor hold a placeholder,
        which stock cannot continue."""
        config = self.model.config
        placeholders = (getattr(config, f"{modality}_token_id", None) for modality in ("image", "video"))
        special = {*self.processor.tokenizer.all_special_ids, *(token for token in placeholders if token is not None)}
        vocabulary = config.get_text_config().vocab_size
        result = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=NEW_TOKENS,
            suppress_tokens=sorted(token for token in special if token < vocabulary),
            pad_token_id=self.processor.tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
        logits = torch.stack(list(result.logits), dim=1)
        count = logits.shape[1]
        return Decoded(result.sequences[:, -count:], logits, result.sequences, cache_of(result))

    def allowed(self, logits: torch.Tensor) -> float:
        """The largest difference from `logits` that rounding explains."""
        return TOLERANCES.get(self.model.dtype, max(TOLERANCES.values())) * float(logits.abs().max())

    def same_logits(self, ours: torch.Tensor, theirs: torch.Tensor) -> str:
        """The largest difference as words; [`Broken`] if it is more than rounding."""
        if ours.shape != theirs.shape:
            raise Broken(f"logits of shape {tuple(ours.shape)}, where {tuple(theirs.shape)} is expected")
        difference, allowed = float((ours - theirs).abs().max()), self.allowed(theirs)
        figure = f"logits differ by {difference:.1e} (tolerance {allowed:.1e})"
        if not difference <= allowed:  # NaN, too
            raise Broken(figure)
        return figure

    def same_answer(self, ours: Decoded, theirs: Decoded) -> str:
        """As `same_logits`, ids included. In half precision two logits that rounding cannot tell apart may swap; in
        float32 only exact ties may. From there on an answer is another, and not compared."""
        if ours.ids.shape != theirs.ids.shape:
            raise Broken(f"ids of shape {tuple(ours.ids.shape)}, where {tuple(theirs.ids.shape)} is expected")
        allowed = self.allowed(theirs.logits)
        tie = 0.0 if self.model.dtype == torch.float32 else allowed
        largest, swapped = 0.0, 0
        for row in range(len(ours.ids)):
            for step, (mine, other) in enumerate(zip(ours.ids[row].tolist(), theirs.ids[row].tolist())):
                our_logits, their_logits = ours.logits[row, step], theirs.logits[row, step]
                difference = float((our_logits - their_logits).abs().max())
                place = f"new token {step + 1} of prompt {row + 1}"
                if not difference <= allowed:
                    raise Broken(f"logits differ by {difference:.1e} at {place} (tolerance {allowed:.1e})")
                largest = max(largest, difference)
                if mine != other:
                    gap = min(float((logits[mine] - logits[other]).abs()) for logits in (our_logits, their_logits))
                    if gap > tie:
                        raise Broken(f"{place} is {mine}, not {other}, and their logits lie {gap:.1e} apart")
                    swapped += 1
                    break
        ids = "same ids" if not swapped else f"{swapped} of {len(ours.ids)} answers part at a tie"
        return f"{ids}, logits differ by {largest:.1e} (tolerance {allowed:.1e})"


def stock_twin(model: Any) -> Any:
    """The stock class of a pruned model on the same weights, which take no memory twice.

    Args:
        model (`RBLGenerationMixin`): a full pruned model on one device.

    Returns:
        The stock model, in eval mode.

    Raises:
        RuntimeError: if the pruned class has other weights than the stock class, but for the codebook.
    """
    with torch.device("meta"):
        stock = type(model).stock(copy.deepcopy(model.config))
    weights = {name: value for name, value in model.state_dict().items() if "codebook." not in name}
    stock.load_state_dict(weights, assign=True)  # tied weights stay so: both names come with one storage
    for name, buffer in stock.named_buffers():
        if buffer.is_meta:  # rotary frequencies and the like, which no checkpoint holds
            owner, _, attribute = name.rpartition(".")
            setattr(stock.get_submodule(owner), attribute, model.get_buffer(name))
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()
