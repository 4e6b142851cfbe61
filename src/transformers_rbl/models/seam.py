"""What transformers calls its things, by role: the one file that knows versions."""

from __future__ import annotations

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast


# transformers 5.24 renamed `past_key_values`, as argument and as output; every name is understood on every version.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def claim_cache(call: dict):
    """The KV cache among arguments, which stays in `call` under the installed name alone; None without one.

    Raises:
        ValueError: for a cache under two names.
    """
    given = {name: call.pop(name) for name in CACHE_NAMES if name in call}
    caches = {name: value for name, value in given.items() if value is not None}
    if len(caches) > 1:
        raise ValueError(f"The cache was given twice, as {' and '.join(caches)}: give {CACHE} alone.")
    if not given:
        return None
    call[CACHE] = next(iter(caches.values()), None)
    return call[CACHE]
