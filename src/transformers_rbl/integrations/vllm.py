"""vLLM plugin (entry point group `vllm.general_plugins`): checkpoints saved by our classes are served as they are.

vLLM calls `register` in every one of its processes. It stays cheap: models are named by strings and imported on use.
"""

# The engine has an environment of its own (tests/engines): where types are checked, it cannot be found.
# pyright: reportMissingImports=false

# By the file that holds them: our classes' names, as checkpoints spell their architecture.
ARCHITECTURES = {
    "vllm_llava": (
        "LlavaForConditionalGenerationRBL",
        "LlavaNextForConditionalGenerationRBL",
        "LlavaOnevisionRBL",
    ),
    "vllm_qwen": ("Qwen2_5_VLForConditionalGenerationRBL", "Qwen3VLForConditionalGenerationRBL"),
    "vllm_internvl": ("InternVLForConditionalGenerationRBL",),
}


def register() -> None:
    """Teach vLLM our model types and architectures."""
    # This file has the name of the engine, which hides it from the type checker.
    from vllm import ModelRegistry  # pyright: ignore[reportAttributeAccessIssue]

    import transformers_rbl

    transformers_rbl.register()
    known = ModelRegistry.get_supported_archs()
    for file, names in ARCHITECTURES.items():
        for name in names:
            if name not in known:
                ModelRegistry.register_model(name, f"transformers_rbl.integrations.{file}:{name}")
