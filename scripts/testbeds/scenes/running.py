"""Optimiser steps with a log, that go on where they were killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


SAVE_EVERY, LOG_EVERY = 50, 25  # steps


def run_steps(
    name: str,
    groups: dict[float, list[torch.nn.Parameter]],
    loss: Callable[[int], dict[str, torch.Tensor | float]],
    steps: int,
    folder: Path,
    state: torch.nn.Module,
    decay: float = 0.0,
    warmup: int = 40,
    stop: int | None = None,
) -> None:
    """`steps` of AdamW, the rate rising over `warmup` and falling along a line to 2%.

    Args:
        groups (`dict[float, list[torch.nn.Parameter]]`): what is learnt by highest rate.
        loss (`Callable`): `loss(step)` is the `"loss"` and further measures; data by step, so a restart draws the same.
        folder (`Path`): `{name}.jsonl` is the log, `{name}.state` what a killed run goes on from.
        state (`torch.nn.Module`): its weights that are learnt are kept in `{name}.state`.
        decay (`float`): weight decay of matrices.
        stop (`int`, *optional*): the step to stop at, with the rate as it is there; the run may go on later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, spent, start = folder / f"{name}.state", 0.0, 0
    last = steps if stop is None else min(stop, steps)
    rows = [
        {
            "params": [weight for weight in weights if (weight.dim() > 1) == matrix],
            "lr": rate,
            "highest": rate,
            "weight_decay": decay if matrix else 0.0,
        }
        for rate, weights in groups.items()
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(rows, betas=(0.9, 0.98))
    learnt = {key: value for key, value in state.named_parameters() if value.requires_grad}
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        with torch.no_grad():
            for key, value in learnt.items():
                value.copy_(saved["weights"][key])
        optimizer.load_state_dict(saved["optimizer"])
        spent, start = saved["spent"], saved["step"]
    began, recent = time.process_time() - spent, []
    with (folder / f"{name}.jsonl").open("a") as log:
        for step in range(start, last):
            for row in optimizer.param_groups:
                row["lr"] = row["highest"] * min(1, (step + 1) / warmup) * (1 - 0.98 * step / steps)
            measures = loss(step)
            measures["loss"].backward()
            torch.nn.utils.clip_grad_norm_(learnt.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append({key: float(torch.as_tensor(value).detach()) for key, value in measures.items()})
            if step % LOG_EVERY == LOG_EVERY - 1 or step == last - 1:
                means = {
                    key: round(float(np.nanmean([row.get(key, np.nan) for row in recent])), 4)
                    for key in {key: None for row in recent for key in row}
                }
                log.write(json.dumps({"step": step + 1, **means, "cpu_s": round(time.process_time() - began)}) + "\n")
                log.flush()
                recent = []
            if step % SAVE_EVERY == SAVE_EVERY - 1 or step == last - 1:
                half = path.with_suffix(".half")
                torch.save(
                    {
                        "weights": learnt,
                        "optimizer": optimizer.state_dict(),
                        "step": step + 1,
                        "spent": time.process_time() - began,
                    },
                    half,
                )
                half.replace(path)
