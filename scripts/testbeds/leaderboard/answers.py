"""Answers of a checkpoint's model under every rule, merge and retention."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, BatchFeature, PreTrainedModel, PreTrainedTokenizerFast

from transformers_rbl import PruningConfig, rbl_class
from transformers_rbl.evaluation.evaluate import refusal
from transformers_rbl.models.merging import MERGE_POLICIES
from transformers_rbl.models.scorers import SCORERS

from ..answering import frame_of
from ..comparison import accuracy
from ..encoding import Encoded, encode_all
from ..rules import keep_all, keep_none, library_rule, oracle, reads_question, scored_rule
from ..testbed import Example
from .cases import Case
from .ledger import Ledger
from .prompts import two_prompts
from .resizing import encode_resized


RETENTIONS = (0.5, 0.33, 0.22, 0.15, 0.1, 0.05, 0.03)
UNPRUNED, NO_IMAGE, ORACLE, RESIZED = "unpruned", "no image", "oracle", "resized"
REFERENCES = (UNPRUNED, NO_IMAGE, ORACLE)  # not rules that anyone could use
PLAIN = "none"


@dataclass(frozen=True)
class Scenes:
    """Which examples a case's model is asked about."""

    count: int
    split: str
    seed: int

    def of(self, case: Case) -> list[Example]:
        return list(case.testbed.examples(case.family, case.kind, self.split, self.count, self.seed))


def load(case: Case) -> PreTrainedModel:
    """A case's model, not pruning until it is told to."""
    loaded = rbl_class(case.checkpoint).from_pretrained(case.checkpoint, pruning={"enabled": False}, dtype="float32")
    return loaded.eval()


class Asked:
    """A case's model and scenes, loaded and encoded when they are first needed."""

    def __init__(self, case: Case, scenes: Scenes):
        self.case, self.scenes = case, scenes

    @functools.cached_property
    def digest(self) -> str:
        """What answers depend on, rules aside: weights and examples."""
        weights = hashlib.sha256()
        for path in sorted(self.case.checkpoint.glob("*.safetensors")):
            weights.update(path.read_bytes())
        return hashlib.sha256(f"{self.case.name} {weights.hexdigest()} {self.scenes}".encode()).hexdigest()[:12]

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        return load(self.case)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return AutoTokenizer.from_pretrained(self.case.checkpoint)

    @functools.cached_property
    def examples(self) -> list[Example]:
        return self.scenes.of(self.case)

    @functools.cached_property
    def encoded(self) -> list[Encoded]:
        return encode_all(self.model, self.examples)

    @functools.cached_property
    def one_by_one(self) -> list[Encoded]:
        """Every scene once for each of its questions, for rules that read the question."""
        placeholders = {self.model.config.image_token_id, getattr(self.model.config, "video_token_id", None)}
        embed, frame, shown = self.model.get_input_embeddings(), frame_of(self.case.family), []
        for item in self.encoded:

            def embedded(question: str, example: Example = item.example) -> torch.Tensor:
                ids = self.tokenizer(frame.prompt(example, question), add_special_tokens=False).input_ids
                return embed(torch.tensor([id_ for id_ in ids if id_ not in placeholders]))

            shown += item.one_by_one(embedded)
        return shown

    @functools.cached_property
    def prompt(self) -> BatchFeature:
        return two_prompts(self.case)[1]

    def about(self) -> dict[str, Any]:
        """What the case is, in numbers."""
        return {
            "name": self.case.name,
            "family": self.case.family,
            "kind": self.case.kind,
            "subject": self.case.testbed.subject,
            "caveats": list(self.case.testbed.caveats),
            "split": self.scenes.split,
            "examples": len(self.examples),
            "questions": [kind for kind, _, _ in self.examples[0].questions],
            "visual_tokens": round(float(np.mean([int((item.group >= 0).sum()) for item in self.encoded])), 1),
            "subject_tokens": round(float(np.mean([item.touched for item in self.encoded])), 4),
            "prototypes": len(self.model.model.codebook.prototypes),
        }

    @torch.no_grad()
    def run(self, rule: str, merge: str, ratio: float) -> dict[str, Any]:
        """Answers under one rule.

        Returns:
            `dict`: either `refused`, why this model cannot, or `kept` (share of the visual tokens, row ends aside),
            `right` (per example a digit, how many answers are right), `found` (share of what questions ask about that
            was kept) and `shows` (what the kept tokens show, in shares).
        """
        shown, questions = self.encoded, len(self.examples[0].questions)
        if rule == RESIZED:
            shown, choose = encode_resized(self.model, self.examples, ratio), keep_all
        elif rule in REFERENCES:
            choose = {UNPRUNED: keep_all, NO_IMAGE: keep_none}.get(rule) or scored_rule(oracle, ratio)
        else:
            pruning = pruning_of(rule, merge, ratio)
            if (refused := refusal(self.model, self.prompt, pruning)) is not None:
                return {"refused": refused}
            choose = library_rule(pruning, self.model.model.codebook)
            if reads_question(rule):
                shown = self.one_by_one
        right, masks = accuracy(self.model, self.tokenizer, shown, choose)
        tokens = sum(int((item.group >= 0).sum()) for item in self.encoded) / len(self.encoded)
        kept = sum(int((mask & (item.group >= 0)).sum()) for mask, item in zip(masks, shown)) / len(shown)
        answers = right.view(len(self.encoded), questions).sum(1)
        found = {} if rule in (RESIZED, NO_IMAGE) else what_is_kept(shown, masks, self.case.testbed.subject)
        return {"kept": round(kept / tokens, 4), "right": "".join(str(int(count)) for count in answers), **found}


def pruning_of(rule: str, merge: str, ratio: float) -> PruningConfig:
    return PruningConfig(keep_ratio=ratio, score=rule, merge=merge)


def runs_of(
    scores: Sequence[str], retentions: Sequence[float], merged_at: Sequence[float] | None = None
) -> Iterator[tuple[str, str, float]]:
    """`(rule, merge, retention)` of every run, references and resizing among them; merging at `merged_at` or at all."""
    yield UNPRUNED, PLAIN, 1.0
    yield NO_IMAGE, PLAIN, 0.0
    for ratio in retentions:
        yield ORACLE, PLAIN, ratio
        yield RESIZED, PLAIN, ratio
        for score in scores:
            for merge in MERGE_POLICIES if merged_at is None or ratio in merged_at else (PLAIN,):
                yield score, merge, ratio


def answer_all(
    case: Case,
    scenes: Scenes,
    ledger: Ledger,
    scores: Sequence[str] = tuple(SCORERS),
    retentions: Sequence[float] = RETENTIONS,
    merged_at: Sequence[float] | None = None,
) -> dict[str, Any]:
    """`about` of a case, and the `rows` of its runs: [`Asked.run`] with `rule`, `merge` and `wanted`. What the ledger
    lacks is answered now."""
    asked, rows = Asked(case, scenes), []
    about = ledger.get((case.name, asked.digest, "about"), asked.about)
    for rule, merge, ratio in tqdm(list(runs_of(scores, retentions, merged_at)), desc=case.name, unit="run"):
        key = (case.name, asked.digest, rule, merge, ratio)
        values = ledger.get(key, functools.partial(asked.run, rule, merge, ratio))
        rows.append({"rule": rule, "merge": merge, "wanted": ratio, **values})
    return {"about": about, "rows": rows}


def what_is_kept(encoded: Sequence[Encoded], masks: Sequence[torch.Tensor], subject: str) -> dict[str, Any]:
    """Of what questions ask about, the share that was kept; of what was kept, the shares of what it shows."""
    kinds: dict[str, float] = {}
    wanted = kept = 0.0
    for item, mask in zip(encoded, masks):
        rows = mask & (item.group >= 0)
        wanted, kept = wanted + float(item.subject.sum()), kept + float(item.subject[rows].sum())
        for name, shares in {subject: item.subject, **item.others}.items():
            kinds[name] = kinds.get(name, 0.0) + float(shares[rows].sum())
    total = sum(kinds.values())
    return {"found": round(kept / wanted, 4), "shows": {name: round(part / total, 4) for name, part in kinds.items()}}
