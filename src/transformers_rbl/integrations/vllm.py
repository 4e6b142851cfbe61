"""vLLM plugin (entry point group `vllm.general_plugins`): checkpoints saved by our classes are served as they are.

vLLM calls `register` in every one of its processes. It stays cheap: models are named by strings and imported on use.
"""

# The engine has an environment of its own (tests/engines): where types are checked, it cannot be found.
# pyright: reportMissingImports=false

ARCHITECTURES = (
    "LlavaForConditionalGenerationRBL",
    "LlavaNextForConditionalGenerationRBL",
    "LlavaOnevisionRBL",
)


def register() -> None:
    """Teach vLLM our model types and architectures."""
    # This file has the name of the engine, which hides it from the type checker.
    from vllm import ModelRegistry  # pyright: ignore[reportAttributeAccessIssue]

    import transformers_rbl

    transformers_rbl.register()
    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, f"transformers_rbl.integrations.vllm_models:{name}")
