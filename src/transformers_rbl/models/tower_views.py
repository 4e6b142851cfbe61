"""A vision tower up to the layer that its family reads: what lies behind is not run."""

from __future__ import annotations

from typing import Any

import torch

from .seam import install_capture


# Towers whose hidden states are their layers' outputs and nothing else, by class: where their encoder is.
ENCODERS = {
    "transformers.models.clip.modeling_clip.CLIPVisionModel": ("encoder", "vision_model.encoder"),
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": ("encoder", "vision_model.encoder"),
}


def up_to_layer(model: Any, count: int) -> Any:
    """A view of a headless model whose vision tower ends behind `count` layers; the model itself where its tower is not
    exactly of a known class, or is called in a way of its own (hooks of accelerate, compilation).

    The view shares every weight and is thrown away after the call: nothing is written on the model.

    Args:
        model: headless, with a `vision_tower`.
        count (`int`): layers to run. `hidden_states[count]` and those before it are what the whole tower's are.
    """
    tower = model.vision_tower
    paths = ENCODERS.get(f"{type(tower).__module__}.{type(tower).__qualname__}", ())
    path = next((path for path in paths if _holds(tower, path)), None)
    if path is None or "forward" in vars(tower) or install_capture is None or torch.compiler.is_compiling():
        return model
    if count >= len(tower.get_submodule(path).layers):
        return model
    install_capture(tower)  # stock does so at the first call: the view's would be another first call
    return _with(model, f"vision_tower.{path}.layers", tower.get_submodule(path).layers[:count])


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
    view = object.__new__(type(module))
    children = {**module._modules, name: _with(module._modules[name], rest, part) if rest else part}
    vars(view).update(vars(module), _modules=children)
    return view
