"""vLLM plugin (entry point group `vllm.general_plugins`): checkpoints saved by our classes are served as they are.

vLLM calls `register` in every one of its processes. It stays cheap: models are named by strings and imported on use.
"""

ARCHITECTURES = (
    "LlavaForConditionalGenerationRBL",
    "LlavaNextForConditionalGenerationRBL",
    "LlavaOnevisionRBL",
)


def register() -> None:
    """Teach vLLM our model types and architectures."""
    from vllm import ModelRegistry

    import transformers_rbl

    transformers_rbl.register()
    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, f"transformers_rbl.integrations.vllm_models:{name}")
