"""`rbl verify`: the library's contracts, checked on a user's own checkpoint and installation.

Each contract is a function of a `Subject`, which computes what several of them need once. A contract returns the figure
to report, or raises `Broken` or `Skipped`; any other exception is a failure too. Whatever the pruned model says is held
against the stock class, which here shares its weights, so that nothing is loaded twice.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from transformers import AutoProcessor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .building.images import READ_ERRORS
from .evaluation.evaluate import prompt_text
from .evaluation.timing import timed_prefill
from .inputs import image_arguments, image_runs, split_inputs
from .models.auto_rbl import rbl_class
from .models.codebook import RedundancyCodebook
from .models.pruning import PruningConfig, kept_token_count
from .models.seam import ALONG, CACHE_NAMES, TOKENS, VIEWS, cache_of, read_by_stock, replaced


PASSED, FAILED, SKIPPED, MEASURED = "passed", "FAILED", "skipped", "measured"
OFF, ALL = PruningConfig(enabled=False), PruningConfig(keep_ratio=1.0)
NEW_TOKENS = 4
LEAST_ROUNDS, MOST_ROUNDS, TIMING_SECONDS = 3, 25, 1.0  # small models are timed more often: they need it
RANDOM_PROTOTYPES = 8
# Of the largest logit. The same sums in another order differ by this much at most over the depth of a large model.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SCORE_TOLERANCE = 1e-5  # float32 cosines against float64
QUESTION = "What is shown in this picture?"
LONGER_QUESTION = "Compare the second picture with the first one: what is the same, and what is not?"
NEXT_TURN = " And why do you think so?"


@dataclass(frozen=True)
class Check:
    """What became of one contract.

    Args:
        name (`str`): the contract, as a sentence.
        result (`str`): `"passed"`, `"FAILED"`, `"skipped"`, or `"measured"` for a timing, which cannot fail.
        figure (`str`): what was found: the largest difference and its tolerance, or why it failed or was skipped.
    """

    name: str
    result: str
    figure: str


@dataclass(frozen=True)
class Report:
    """A bug report: what was checked, where, and what became of it.

    Args:
        versions (`dict[str, str]`): packages, Python, platform, device and dtype.
        settings (`dict[str, str]`): model, codebook, picture and keep ratio.
        checks (`list[Check]`): in the order in which they ran.
    """

    versions: dict[str, str]
    settings: dict[str, str]
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.result != FAILED for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"passed": self.passed, **asdict(self)}


class Broken(Exception):
    """A contract does not hold."""


class Skipped(Exception):
    """A contract cannot be checked here."""


def verify_checkpoint(
    model: str | os.PathLike,
    codebook: str | os.PathLike | None = None,
    image: str | os.PathLike | None = None,
    keep_ratio: float = 0.2,
    device: str | None = None,
    dtype: str = "auto",
) -> Report:
    """Load a checkpoint once and check the contracts on it.

    Args:
        model (`str` or `os.PathLike`): stock or pruned checkpoint, folder or Hub id.
        codebook (`str` or `os.PathLike`, *optional*): folder or Hub id. Default: the checkpoint's own, and for a stock
            checkpoint some visual tokens of the picture.
        image (`str` or `os.PathLike`, *optional*): a picture's file; one is drawn without it.
        keep_ratio (`float`, defaults to 0.2): share of visual tokens to keep.
        device (`str`, *optional*): default a GPU if there is one.
        dtype (`str`, defaults to `"auto"`): as in `from_pretrained`.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: for a keep ratio, codebook, image or architecture that does not fit.
    """
    name, pruning = str(model), PruningConfig(keep_ratio=keep_ratio)
    picture = drawn_picture() if image is None else open_picture(image)
    prototypes = None if codebook is None else RedundancyCodebook.from_pretrained(codebook)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = {
        "model": name,
        "codebook": str(codebook),
        "picture": "a drawn one" if image is None else str(image),
        "keep_ratio": str(keep_ratio),
    }
    processor = AutoProcessor.from_pretrained(name)
    pruned_class = rbl_class(name)
    try:
        loaded, loading_info = pruned_class.from_pretrained(name, pruning=OFF, dtype=dtype, output_loading_info=True)
    except ValueError as error:  # missing weights: the first contract, and nothing is left to check the others on
        checks = [Check(LOADS, FAILED, _first_line(error))]
        checks += [Check(other, SKIPPED, "the checkpoint did not load") for other in CONTRACTS if other != LOADS]
        return Report(versions(device, dtype), settings, checks)

    loaded = loaded.eval().to(device)
    loaded.config.full_length_logits = False  # a matter of presentation, which the comparisons would have to undo
    if prototypes is not None:
        loaded.set_codebook(prototypes)
        made_for = f" (made for {prototypes.base_model})" if prototypes.base_model else ""
        settings["codebook"] = f"{codebook}{made_for}"
    elif loaded.codebook is not None:
        settings["codebook"] = "the checkpoint's own"
    else:
        loaded.set_codebook(codebook_of_picture(loaded, processor, picture))
        settings["codebook"] = f"{RANDOM_PROTOTYPES} random visual tokens of the picture"
    checks = verify(loaded, processor, picture, keep_ratio=pruning.keep_ratio, loading_info=loading_info)
    return Report(versions(str(loaded.device), str(loaded.dtype)), settings, checks)


def verify(
    model: Any,
    processor: Any,
    image: Image.Image | None = None,
    *,
    keep_ratio: float | None = 0.2,
    loading_info: Mapping[str, Any] | None = None,
) -> list[Check]:
    """Check the contracts on a loaded model: about a dozen passes over a prompt, half of them over pruned ones.

    Args:
        model (`RBLGenerationMixin`): a full pruned model with a codebook, in eval mode, on one device. It is not
            changed; its own settings are not used.
        processor (`ProcessorMixin`): the checkpoint's.
        image (`PIL.Image.Image`, *optional*): the picture to ask about; one is drawn without it.
        keep_ratio (`float`, defaults to 0.2): share of visual tokens to keep.
        loading_info (`dict`, *optional*): what `from_pretrained(…, output_loading_info=True)` returned beside the
            model; without it that contract is skipped.

    Raises:
        ValueError: for a model of which the stock class cannot share the weights, or without codebook.
    """
    pruning = PruningConfig(keep_ratio=keep_ratio)
    _check_model(model)
    with torch.no_grad():
        picture = drawn_picture() if image is None else image
        subject = Subject(model, stock_twin(model), processor, picture, pruning, loading_info)
        return [_run(name, contract, subject) for name, contract in CONTRACTS.items()]


def _check_model(model: Any) -> None:
    if model.codebook is None:
        raise ValueError("This model has no codebook to prune with: call model.set_codebook(…) first.")
    if model.training:
        raise ValueError("Contracts hold in eval mode: call model.eval() first.")
    if getattr(model, "hf_quantizer", None) is not None or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            "The stock class has to share the model's weights: load it unquantised, on one device, without device_map."
        )
    if model.config.full_length_logits:
        raise ValueError("Logits are compared at kept positions: set model.config.full_length_logits = False first.")


def _run(name: str, contract: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(name, MEASURED if contract is prefill_time else PASSED, contract(subject))
    except Skipped as reason:
        return Check(name, SKIPPED, str(reason))
    except Broken as finding:
        return Check(name, FAILED, str(finding))
    except Exception as error:  # a check that cannot be made is a finding, and the others go on
        return Check(name, FAILED, f"{type(error).__name__}: {_first_line(error)}")


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
        return self.stock.get_image_features(**image_arguments(self.stock, self.prompt), return_dict=True)

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
        kept = torch.cat(list(self.output.keep_masks))
        parts: dict[str, Any] = {TOKENS: self.model.family.joined("image", [torch.cat(self.features)[kept]])}
        for name in VIEWS:
            if self.encoded.get(name) is not None:
                parts[name] = [[torch.cat(list(view))[kept]] for view in self.encoded[name]]
        compact["mm_encoder_outputs"] = {"image": replaced(read_by_stock(self.encoded), **parts)}
        return compact

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


def loads_completely(subject: Subject) -> str:
    """Every weight comes from the checkpoint, and is a number."""
    info = subject.loading_info
    if info is None:
        raise Skipped("the model was loaded elsewhere: pass loading_info")
    for problem in ("mismatched_keys", "error_msgs"):
        if found := info.get(problem):
            raise Broken(f"{problem.replace('_', ' ')}: {', '.join(map(str, sorted(found, key=str)[:3]))}")
    weights = subject.model.state_dict()
    broken = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise Broken(f"not finite: {', '.join(broken[:3])}{' …' * (len(broken) > 3)}")
    unread = sorted(info.get("unexpected_keys", ()))
    note = f"; {len(unread)} tensors of the checkpoint are not read, e.g. {unread[0]}" if unread else ""
    never_read = sorted(info.get("missing_keys", ()))  # from_pretrained raises for the others
    note += f"; {len(never_read)} that no pass reads are missing" if never_read else ""
    return f"{len(weights)} tensors, all finite{note}"


def off_is_stock(subject: Subject) -> str:
    """Without pruning, forward and generate are the stock class's, bit for bit."""
    ours, theirs = subject.model(**subject.prompt, use_cache=False, pruning=OFF).logits, subject.stock_logits
    if not torch.equal(ours, theirs):
        raise Broken(f"forward: {_difference(ours, theirs)}")
    answer, expected = subject.decode(subject.model, subject.prompt, pruning=OFF), subject.stock_answer
    if not torch.equal(answer.sequences, expected.sequences):
        raise Broken(f"generate: ids {answer.ids.tolist()}, not {expected.ids.tolist()}")
    if not torch.equal(answer.logits, expected.logits):
        raise Broken(f"generate: {_difference(answer.logits, expected.logits)}")
    return f"{ours.shape[1]} positions and {NEW_TOKENS} new tokens, difference 0"


def keep_all_is_stock(subject: Subject) -> str:
    """With every token kept, so are they."""
    output = subject.model(**subject.prompt, use_cache=False, pruning=ALL)
    if not output.prompt_mask.all():
        raise Broken(f"keep_ratio=1.0 dropped {int((~output.prompt_mask).sum())} positions")
    subject.same_logits(output.logits, subject.stock_logits)
    return subject.same_answer(subject.decode(subject.model, subject.prompt, pruning=ALL), subject.stock_answer)


def sees_kept_tokens_alone(subject: Subject) -> str:
    """The KV cache holds the text and as many visual tokens as `kept_token_count` promises."""
    output, ratio = subject.output, subject.pruning.keep_ratio
    assert ratio is not None  # a Subject's pruning is by ratio
    slots = subject.prompt["input_ids"][0] == subject.model.config.image_token_id
    text, before = int((~slots).sum()), int(slots.sum())
    promised = [
        int((~patches).sum()) + kept_token_count(int(patches.sum()), ratio, subject.pruning.min_tokens)
        for patches in subject.patches
    ]
    after = [int(mask.sum()) for mask in output.keep_masks]
    if after != promised:
        raise Broken(f"{after} visual tokens were kept, and kept_token_count promises {promised}")
    if not torch.equal(output.prompt_mask[0].to(subject.kept.device), subject.kept):
        raise Broken("prompt_mask and keep_masks do not say the same")
    cache = cache_of(output)
    states = (LinearAttentionCacheLayerMixin,)  # of a fixed size, whatever they have seen
    lengths = {int(layer.get_seq_length()) for layer in cache.layers if not isinstance(layer, states)}
    if lengths != {text + sum(promised)}:
        raise Broken(f"the KV cache holds {sorted(lengths)} entries; text and kept tokens are {text + sum(promised)}")
    return f"{before} visual tokens become {sum(promised)}, the KV cache holds {text + sum(promised)} entries"


def drops_the_most_redundant(subject: Subject) -> str:
    """No token stays that is more redundant than one that went, by cosines in float64."""
    worst = -2.0
    for tokens, patches, mask in zip(subject.features, subject.patches, subject.output.keep_masks, strict=True):
        scores = cosines(subject.model.codebook, tokens)
        mask = mask.to(scores.device)
        if not mask[~patches].all():
            raise Broken("row ends were dropped")
        stayed, gone = scores[patches & mask], scores[patches & ~mask]
        if len(gone):
            worst = max(worst, float(stayed.max() - gone.min()))
    if not worst <= SCORE_TOLERANCE:
        raise Broken(f"a token stayed whose score is {worst:.1e} above that of one that went")
    if worst == -2.0:
        raise Skipped(f"keep_ratio={subject.pruning.keep_ratio} drops nothing of this picture")
    return f"highest score kept {-worst:.1e} below lowest dropped (tolerance {SCORE_TOLERANCE:.0e})"


def equals_oracle(subject: Subject) -> str:
    """The stock class, given the text and the kept tokens by hand, says the same."""
    subject.same_logits(subject.output.logits, subject.stock(**subject.by_hand, use_cache=False).logits)
    return subject.same_answer(subject.answer, subject.decode(subject.stock, subject.by_hand))


def batch_equals_single(subject: Subject) -> str:
    """Prompts of different lengths answer in a padded batch as they do alone."""
    prompts = [subject.prompt, subject.longer_prompt]

    def alone(model: Any, **kwargs: Any) -> Decoded:
        answers = [subject.decode(model, prompt, **kwargs) for prompt in prompts]
        ids, logits = (torch.cat([getattr(one, name) for one in answers]) for name in ("ids", "logits"))
        return Decoded(ids, logits, ids, None)

    lengths = " and ".join(str(int(mask.sum())) for mask in subject.batch["attention_mask"])
    together = subject.answers
    try:
        figure = subject.same_answer(together, alone(subject.model, pruning=subject.pruning))
    except Broken:
        stock_together = subject.decode(subject.stock, subject.batch)
        if not stock_together.logits.isfinite().all():
            raise
        try:
            subject.same_answer(stock_together, alone(subject.stock))
        except Broken as finding:
            raise Skipped(
                f"the stock class answers a padded batch otherwise than its prompts, too: {finding}"
            ) from None
        raise
    return f"prompts of {lengths} tokens: {figure}"


def second_turn_equals_starting_over(subject: Subject, name: str) -> str:
    """A turn on the cache of a padded batch, given under one of its names, equals one without: generate and forward."""
    turn, expected = subject.next_turn, subject.started_over
    cache = copy.deepcopy(subject.answers.cache)
    figure = subject.same_answer(
        subject.decode(subject.model, {**turn, name: cache}, pruning=subject.pruning), expected
    )
    cache = copy.deepcopy(subject.answers.cache)
    new = turn["input_ids"][:, subject.answers.sequences.shape[1] - 1 :]  # the last token of an answer is in no cache
    output = subject.model(
        input_ids=new, attention_mask=turn["attention_mask"], **{name: cache}, pruning=subject.pruning
    )
    subject.same_logits(output.logits[:, -1], expected.logits[:, 0])
    return figure


def static_cache_is_the_same(subject: Subject) -> str:
    """A cache allocated in advance gives the same answer."""
    static = {"cache_implementation": "static", "disable_compile": True}
    try:
        answer = subject.decode(subject.model, subject.prompt, pruning=subject.pruning, **static)
    except Exception as error:
        try:
            subject.decode(subject.stock, subject.prompt, **static)
        except Exception as stock_error:
            if type(stock_error) is type(error):
                raise Skipped(f"the stock class has no static cache either: {_first_line(stock_error)}") from error
        raise
    return subject.same_answer(answer, subject.answer)


def scores_are_float32(subject: Subject) -> str:
    """Scores are float32 whatever the model's dtype, and right."""
    codebook, tokens = subject.model.codebook, subject.features[0]
    scores = codebook.score(tokens)
    for name, dtype in (("prototypes", codebook.prototypes.dtype), ("scores", scores.dtype)):
        if dtype != torch.float32:
            raise Broken(f"{name} are {dtype}")
    difference = float((scores.double() - cosines(codebook, tokens)).abs().max())
    figure = f"they differ from float64 by {difference:.1e} (tolerance {SCORE_TOLERANCE:.0e})"
    if not difference <= SCORE_TOLERANCE:
        raise Broken(figure)
    return figure


def prefill_time(subject: Subject) -> str:
    """Stock, pruned and oracle (the language model alone on the kept tokens: what cannot be undercut) in turn, so that
    what else the machine does meets all of them."""
    contenders: dict[str, Callable[[], Any]] = {
        "stock": partial(timed_prefill, subject.stock, **subject.prompt),
        "pruned": partial(timed_prefill, subject.model, **subject.prompt, pruning=subject.pruning),
        "oracle": partial(timed_prefill, subject.stock, **subject.by_hand),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rounds, began = 0, time.perf_counter()
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() - began < TIMING_SECONDS):
        rounds += 1
        for name, prefill in contenders.items():
            seconds[name].append(prefill()[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [f"{name} / stock {medians[name] / medians['stock']:.2f}" for name in contenders if name != "stock"]
    length = subject.prompt["input_ids"].shape[1]
    return f"stock {medians['stock']:.3f} s for {length} tokens; {'; '.join(ratios)} (medians of {rounds})"


LOADS = "The checkpoint loads completely"
CONTRACTS: dict[str, Callable[[Subject], str]] = {
    LOADS: loads_completely,
    "Pruning off is the stock class": off_is_stock,
    "Keeping all is the stock class": keep_all_is_stock,
    "The language model sees kept tokens alone": sees_kept_tokens_alone,
    "The most redundant tokens are dropped": drops_the_most_redundant,
    "The answer is that of kept tokens by hand": equals_oracle,
    "A batch is its prompts one by one": batch_equals_single,
    **{
        f"A second turn on {name}= is starting over": partial(second_turn_equals_starting_over, name=name)
        for name in CACHE_NAMES
    },
    "A static cache gives the same answer": static_cache_is_the_same,
    "Scores are float32": scores_are_float32,
    "Prefill": prefill_time,
}


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


@torch.no_grad()
def codebook_of_picture(model: Any, processor: Any, image: Image.Image) -> RedundancyCodebook:
    """A codebook for a model that has none: random visual tokens of a picture. It says nothing of what is redundant,
    and exercises everything.

    Args:
        model (`RBLGenerationMixin`): a full pruned model whose pruning is off.
        processor (`ProcessorMixin`): the checkpoint's.
        image (`PIL.Image.Image`): the picture.
    """
    text = prompt_text(processor, QUESTION, 1)
    inputs = processor(images=[[image]], text=[text], return_tensors="pt").to(model.device, model.dtype)
    encoded = model.get_image_features(**image_arguments(model, inputs), return_dict=True)
    tokens = torch.cat(model.family.split(model.config, list(encoded[TOKENS]))).float()
    tokens = tokens[(tokens != 0).any(-1)]
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:RANDOM_PROTOTYPES]
    return RedundancyCodebook(tokens[chosen.to(tokens.device)])


def cosines(codebook: RedundancyCodebook, tokens: torch.Tensor) -> torch.Tensor:
    """`(L,)` float64: each token's largest cosine with a prototype, independently of the library's own scorer."""
    prototypes = torch.nn.functional.normalize(codebook.get_buffer("prototypes").to(tokens.device).double(), dim=-1)
    return (torch.nn.functional.normalize(tokens.double(), dim=-1) @ prototypes.T).amax(-1)


def drawn_picture(width: int = 448, height: int = 336) -> Image.Image:
    """A picture without network or files: colours that change everywhere, a few shapes, and noise."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colours = np.stack([across, down, 1 - across * down], axis=-1) * 200
    noise = np.random.RandomState(0).randint(0, 56, (height, width, 3))
    image = Image.fromarray((colours + noise).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 4, width // 2, 7 * height // 8), fill=(220, 40, 40), outline="black", width=4)
    draw.rectangle((5 * width // 8, height // 8, 7 * width // 8, height // 2), fill=(40, 90, 220))
    draw.polygon([(width // 2, height), (3 * width // 4, height // 2), (width, height)], fill=(30, 160, 70))
    return image


def open_picture(path: str | os.PathLike) -> Image.Image:
    """A picture's file as RGB, upright.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except READ_ERRORS as error:
        raise ValueError(f"{path} is no image that can be read ({_first_line(error)}).") from error


def versions(device: str, dtype: str) -> dict[str, str]:
    """What a bug report has to say of an installation."""
    packages = ("transformers_rbl", "transformers", "torch", "tokenizers", "huggingface_hub")
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else ""
    return {
        **{name: _version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device}{gpu}",
        "dtype": dtype.removeprefix("torch."),
    }


def _version(package: str) -> str:
    from transformers_rbl import __version__  # not installed where a checkout is on the path alone

    return __version__ if package == "transformers_rbl" else importlib.metadata.version(package)


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    if ours.shape != theirs.shape:
        return f"logits of shape {tuple(ours.shape)}, where {tuple(theirs.shape)} is expected"
    return f"logits differ by {float((ours - theirs).abs().max()):.1e}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
