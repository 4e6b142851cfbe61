"""The scene of a checkpoint in which a rule lost most of what the oracle kept."""

from __future__ import annotations

import torch

from transformers_rbl import PruningConfig
from transformers_rbl.evaluation.plots import kept_grids

from ..encoding import encode_all
from ..rules import library_rule, oracle, scored_rule
from ..tokens import visual_inputs
from .answers import ORACLE, Scenes, load
from .cases import Case
from .drawing import Lost


@torch.no_grad()
def worst_scene(case: Case, score: str, ratio: float, scenes: Scenes) -> Lost | None:
    """The image (or frame) of the scenes of whose answer the rule keeps least, compared with the oracle; None if it
    keeps as much of all."""
    model = load(case)
    rule = library_rule(PruningConfig(keep_ratio=ratio, score=score), model.model.codebook)
    rules = {ORACLE: scored_rule(oracle, ratio), score: rule}
    worst, scene = 0.0, None
    for encoded in encode_all(model, scenes.of(case)):
        example = encoded.example
        inputs, modality = visual_inputs(model.config, [example]), "video" if example.video else "image"
        layouts = model.model.layouts(modality, **inputs)
        lengths = [len(layout) for layout in layouts]
        masks = {name: choose([encoded])[0].mask.split(lengths) for name, choose in rules.items()}
        subjects = (encoded.subject >= 0.5).split(lengths)
        for number, (layout, subject) in enumerate(zip(layouts, subjects)):
            shown = {name: kept_grids(mask[number], layout) for name, mask in masks.items()}
            shown["subject"] = kept_grids(subject, layout)
            grids = {name: each.get("tiles", each["base"]) for name, each in shown.items()}
            for frame in range(layout.frames):
                parts = {name: grid.reshape(layout.frames, -1, grid.shape[1])[frame] for name, grid in grids.items()}
                asked = parts.pop("subject")
                lost = int((asked & parts[ORACLE]).sum()) - int((asked & parts[score]).sum())
                if lost > worst:
                    worst, scene = lost, Lost(case.name, example.images[number + frame], asked, parts)
    return scene
