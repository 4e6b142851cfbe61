"""What of a vision tower has to run: the layers that its family reads, on images that are not there twice.

A call gets a view of the headless model: it shares every weight, its tower does less, and it is thrown away afterwards.
Nothing is written on the model, so that threads do not meet. A tower that is not exactly of a known class, or is called
in a way of its own (hooks of accelerate, compilation), runs as stock runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .seam import install_capture


# Towers that encode each image of a batch by itself, and whose hidden states are their layers' outputs and nothing
# else, by class: where their encoder is.
ENCODERS = {
    "transformers.models.clip.modeling_clip.CLIPVisionModel": ("encoder", "vision_model.encoder"),
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": ("encoder", "vision_model.encoder"),
}
PROBES = 64  # values of an image that are compared before all are


def up_to_layer(model: Any, count: int) -> Any:
    """A view whose vision tower ends behind `count` layers; the model itself where that cannot be had.

    `hidden_states[count]` and those before it are what the whole tower's are.

    Args:
        model: headless, with a `vision_tower`.
        count (`int`): layers to run.
    """
    path = encoder_path(model)
    if path is None or count >= len(model.vision_tower.get_submodule(path).layers):
        return model
    return _with(model, f"vision_tower.{path}.layers", model.vision_tower.get_submodule(path).layers[:count])


def each_once(model: Any) -> Any:
    """A view whose vision tower encodes images of a batch that are equal pixel for pixel once: tiles without content,
    a video that stands still, an image sent twice. The model itself where that cannot be had, and in training, where
    dropout makes equal images different.

    Finding them costs two small reads before the tower, the second one only where a sample of pixels is equal.

    Args:
        model: headless, with a `vision_tower`.
    """
    if encoder_path(model) is None or model.training:
        return model

    def forward(tower: Any, pixel_values: torch.Tensor, **settings: Any) -> Any:
        first, image_of = distinct(pixel_values)
        if len(first) == len(pixel_values):
            return tower.forward(pixel_values, **settings)
        return _rows(tower.forward(pixel_values[first], **settings), torch.tensor(image_of))

    return with_forward(model, forward)


def with_forward(model: Any, forward: Callable[..., Any]) -> Any:
    """A view of a headless model whose tower is called through `forward(tower, pixel_values, **settings)`."""
    tower = model.vision_tower
    view = _shared(tower)
    vars(view)["forward"] = lambda pixel_values, **settings: forward(tower, pixel_values, **settings)
    return _with(model, "vision_tower", view)


def those_needed(model: Any, looked: Any, needed: list[list[bool]]) -> Any:
    """A view whose vision tower encodes those tiles alone that are needed. The first of each image was encoded before;
    hidden states of the others are zero.

    Args:
        model: headless, with a `vision_tower`.
        looked (`ModelOutput`): what the tower said of the first tiles, with `hidden_states`.
        needed (`list[list[bool]]`): of each image its tiles, the first one needed.
    """
    first = [tile == 0 for image in needed for tile in range(len(image))]
    rest = [is_needed and tile > 0 for image in needed for tile, is_needed in enumerate(image)]

    def forward(tower: Any, pixel_values: torch.Tensor, **settings: Any) -> Any:
        rows = [row for row, is_needed in enumerate(rest) if is_needed]
        found = tower.forward(pixel_values[rows], **settings).hidden_states if rows else looked.hidden_states
        rows_before = [row for row, is_first in enumerate(first) if is_first]
        states = []
        for before, now in zip(looked.hidden_states, found):
            state = None
            if before is not None:
                state = before.new_zeros(len(first), *before.shape[1:])
                for values, where in ((before, rows_before), (now, rows)):
                    if where:
                        state = state.index_copy(0, torch.tensor(where).to(state.device, non_blocking=True), values)
            states.append(state)
        return BaseModelOutputWithPooling(hidden_states=tuple(states))

    return with_forward(model, forward)


def distinct(images: torch.Tensor) -> tuple[list[int], list[int]]:
    """Which images of a batch are equal pixel for pixel.

    Args:
        images (`torch.Tensor` of shape `(n, ...)`).

    Returns:
        `tuple[list[int], list[int]]`: the first of each group of equal images, and for each image the place of its
        group in that list.
    """
    rows = images.flatten(1)
    probes = rows[:, :: max(1, rows.shape[1] // PROBES)].float().cpu().numpy()
    groups: dict[bytes, list[int]] = {}
    for number, probe in enumerate(probes):
        groups.setdefault(probe.tobytes(), []).append(number)
    pairs = [(group[0], other) for group in groups.values() for other in group[1:]]
    equal = torch.stack([(rows[a] == rows[b]).all() for a, b in pairs]).tolist() if pairs else []
    same_as = {other: first for (first, other), is_equal in zip(pairs, equal) if is_equal}
    first = [number for number in range(len(images)) if number not in same_as]
    place = {number: index for index, number in enumerate(first)}
    return first, [place[same_as.get(number, number)] for number in range(len(images))]


def encoder_path(model: Any) -> str | None:
    """Where the encoder of a tower of a known class is; None where its calls must not be touched."""
    tower: Any = getattr(model, "vision_tower", None)
    paths = ENCODERS.get(f"{type(tower).__module__}.{type(tower).__qualname__}", ())
    if not paths or "forward" in vars(tower) or install_capture is None or torch.compiler.is_compiling():
        return None
    install_capture(tower)  # stock does so at the first call: a view's would be another first call
    return next((path for path in paths if _holds(tower, path)), None)


def _rows(output: Any, index: torch.Tensor) -> Any:
    """An output of the tower, with these of its rows, in this order."""
    if isinstance(output, torch.Tensor):
        return output[index.to(output.device, non_blocking=True)]
    if isinstance(output, tuple):
        return tuple(_rows(part, index) for part in output)
    return None if output is None else type(output)(**{name: _rows(part, index) for name, part in output.items()})


def _holds(tower: torch.nn.Module, path: str) -> bool:
    """Whether each module along the path is there, and called as its class says."""
    module = tower
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None or "forward" in vars(module):
            return False
    return True


def _with(module: Any, path: str, part: torch.nn.Module) -> Any:
    """A copy of a module, and of those along the path to `part`; all others are shared."""
    name, _, rest = path.partition(".")
    view = _shared(module)
    vars(view)["_modules"] = {**module._modules, name: _with(module._modules[name], rest, part) if rest else part}
    return view


def _shared(module: Any) -> Any:
    """A copy of a module that shares all that it holds."""
    view = object.__new__(type(module))
    vars(view).update(vars(module))
    return view
