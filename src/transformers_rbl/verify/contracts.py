"""The contracts: each is a function of a `Subject`, which returns the figure to report.

One that does not hold raises `Broken`, one that cannot be checked here `Skipped`; any other exception is a failure too.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ..evaluation.timing import timed_prefill
from ..models.codebook import RedundancyCodebook
from ..models.pruning import kept_token_count
from ..models.seam import CACHE_NAMES, cache_of
from .report import first_line
from .subject import ALL, NEW_TOKENS, OFF, Broken, Decoded, Skipped, Subject


LEAST_ROUNDS, MOST_ROUNDS, TIMING_SECONDS = 3, 25, 1.0  # small models are timed more often: they need it
SCORE_TOLERANCE = 1e-5  # float32 cosines against float64


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
        raise Broken(f"forward: {difference(ours, theirs)}")
    answer, expected = subject.decode(subject.model, subject.prompt, pruning=OFF), subject.stock_answer
    if not torch.equal(answer.sequences, expected.sequences):
        raise Broken(f"generate: ids {answer.ids.tolist()}, not {expected.ids.tolist()}")
    if not torch.equal(answer.logits, expected.logits):
        raise Broken(f"generate: {difference(answer.logits, expected.logits)}")
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
    if subject.pruning.score != "cosine":
        raise Skipped(f"score={subject.pruning.score!r} is another rule than the codebook's cosines")
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
    if subject.pruning.needs_question:
        raise Skipped(f"score={subject.pruning.score!r} reads the question, and is refused on the cache of another one")
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
                raise Skipped(f"the stock class has no static cache either: {first_line(stock_error)}") from error
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


def cosines(codebook: RedundancyCodebook, tokens: torch.Tensor) -> torch.Tensor:
    """`(L,)` float64: each token's largest cosine with a prototype, independently of the library's own scorer."""
    prototypes = torch.nn.functional.normalize(codebook.get_buffer("prototypes").to(tokens.device).double(), dim=-1)
    return (torch.nn.functional.normalize(tokens.double(), dim=-1) @ prototypes.T).amax(-1)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    if ours.shape != theirs.shape:
        return f"logits of shape {tuple(ours.shape)}, where {tuple(theirs.shape)} is expected"
    return f"logits differ by {float((ours - theirs).abs().max()):.1e}"


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
