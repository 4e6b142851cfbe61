"""How transformers is taught to prune: the prompt loses the placeholders of visual tokens that were dropped.

Headless models prune what `get_image_features` returns and say what they kept, `keep_masks` (`features_rbl.py`).
`RBLMixin` is what headless and full models share: loading, settings, and the compact prompt in `forward`. Full models
do the same in `generate` (`generation_rbl.py`). Features that carry `keep_masks` belong to a prompt with all its
placeholders, features without to one that fits them already.
"""

import copy
import functools
import inspect
import os

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import logging

from .codebook import RedundancyCodebook
from .hub import auto_map, copy_code, push_model
from .loading import check_base_model, inherit_key_conversion, missing_weights
from .prompt import CachedPrompt, PromptPlan, check_placeholders, scatter_to_prompt
from .pruning import PruningConfig
from .seam import CACHE, claim_cache


logger = logging.get_logger(__name__)

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
MASKS = {"image": "keep_masks", "video": "video_keep_masks"}
# What else runs along the prompt, and what stands at padding.
ALIGNED = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}

PRUNING_DOC = """

    A pruned model takes one more argument:

        pruning ([`PruningConfig`] or `dict`, *optional*): settings for this call in place of the model's own;
            `PruningConfig(enabled=False)` gives the stock model's answer.
"""


def with_pruning(stock, pruned):
    """`pruned(self, stock, call, pruning)` as a method with the signature of `stock`, plus `pruning`.

    transformers and Trainer read signatures to learn what a model takes, so parameters must not hide behind `**kwargs`.
    """
    signature = inspect.signature(stock)
    parameters = list(signature.parameters.values())
    names = [parameter.name for parameter in parameters[1:]]
    extra = inspect.Parameter("pruning", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))

    @functools.wraps(stock)
    def method(self, *args, pruning=None, **kwargs):
        if args:
            signature.bind(self, *args, **kwargs)  # a TypeError for surplus or repeated arguments
        if pruning is not None:
            pruning = PruningConfig.from_dict(pruning)  # wrong settings are refused, images or not
        return pruned(self, stock, {**dict(zip(names, args)), **kwargs}, pruning)

    method.__signature__ = signature.replace(parameters=[*parameters[:at], extra, *parameters[at:]])
    method.__doc__ = (stock.__doc__ or "") + PRUNING_DOC
    return method


class RBLMixin:
    """What the headless and the full class share: loading, settings, and prompt compaction in `forward`."""

    def __init_subclass__(cls, stock=None, **kwargs):
        """`stock` is the class that this one prunes: its methods are taken over, and its checkpoints are read as it
        does."""
        super().__init_subclass__(**kwargs)
        if stock is not None:
            cls.stock = stock
            cls.forward = with_pruning(stock.forward, RBLMixin._forward)
            inherit_key_conversion(cls, stock)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        codebook=None,
        keep_ratio: float | None = None,
        threshold: float | None = None,
        pruning: PruningConfig | dict | None = None,
        check_base: bool = True,
        codebook_revision: str | None = None,
        **kwargs,
    ):
        """Load a stock checkpoint with a codebook, or a checkpoint that this class saved.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): as in transformers.
            codebook ([`RedundancyCodebook`], `str` or `os.PathLike`, *optional*): the object, a folder or a Hub id;
                replaces the checkpoint's own.
            keep_ratio, threshold (`float`, *optional*): one of them, in place of all saved settings. Without either, a
                new codebook's recommended setting is used (its keep ratio first).
            pruning ([`PruningConfig`] or `dict`, *optional*): all settings at once, in place of
                `keep_ratio`/`threshold`.
            check_base (`bool`, defaults to `True`): refuse a codebook made for another base model.
            codebook_revision (`str`, *optional*): branch, tag or commit of the codebook's repository.
            kwargs: everything that transformers' `from_pretrained` takes; `token`, `cache_dir`, `local_files_only` and
                `force_download` hold for the codebook too.

        Raises:
            ValueError: for settings or a codebook that do not fit, and if the checkpoint lacks a weight that the
                forward pass reads (transformers would fill it with random numbers).
        """
        if pruning is None and (keep_ratio is not None or threshold is not None):
            pruning = PruningConfig(keep_ratio=keep_ratio, threshold=threshold)
        elif keep_ratio is not None or threshold is not None:
            raise ValueError("Give either pruning=PruningConfig(…) or keep_ratio=/threshold=, not both.")
        if codebook is not None and not isinstance(codebook, RedundancyCodebook):
            names = ("token", "cache_dir", "local_files_only", "force_download")
            shared = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            codebook = RedundancyCodebook.from_pretrained(codebook, revision=codebook_revision, **shared)
        elif codebook_revision is not None:
            raise ValueError("codebook_revision belongs to a codebook from the Hub: give codebook= its id.")
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(config, cls.config_class):
            kwargs["config"] = cls.config_class.from_dict(
                {**config.to_dict(), "model_type": cls.config_class.model_type}
            )
        with_info = kwargs.pop("output_loading_info", False)

        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"A weights file of {pretrained_model_name_or_path} is truncated or no safetensors file ({error}): "
                "download it again, with force_download=True if it is from the Hub."
            ) from error
        missing = missing_weights(model, info["missing_keys"])
        if codebook is not None:  # it takes the place of one in the checkpoint
            missing = [key for key in missing if not key.endswith("codebook.prototypes")]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold every weight of {cls.__name__}; transformers has left "
                f"random numbers in: {', '.join(missing)}."
            )
        model._settle(codebook, pruning, check_base)
        return (model, info) if with_info else model

    def _settle(self, codebook, pruning, check_base: bool) -> None:
        """After loading: give the codebook its place, the config its settings, and refuse what does not fit."""
        name = self.config.name_or_path
        if self.config.base_model is None and self.config.num_prototypes is None and name and not os.path.isdir(name):
            self.config.base_model = name  # a stock checkpoint from the Hub
        if codebook is not None:
            if check_base:
                check_base_model(codebook, self.config.base_model)
            if pruning is None and self.config.pruning is None:
                pruning = codebook.recommended_pruning
                if pruning is None:
                    logger.warning(
                        "The codebook recommends no setting and none was given, so pruning stays off: pass "
                        "keep_ratio=, threshold= or pruning=, here or per call."
                    )
        if (codebook := codebook or self.base_model.codebook) is not None:
            self.set_codebook(codebook)
        if pruning is not None:
            self.pruning = pruning
        try:
            _ = self.pruning  # saved settings that are broken end here,
        except ValueError as error:
            raise ValueError(f"config.json of {name}: {error} Upgrade it, or give pruning= here.") from error
        self._active_pruning(None)  # and those that lack their codebook

    def save_pretrained(self, save_directory, *args, with_code: bool = False, **kwargs):
        """As in transformers: weights, codebook and settings.

        Args:
            save_directory (`str` or `os.PathLike`): made if missing.
            with_code (`bool`, defaults to `False`): write this library's inference files too, so that a machine without
                it loads the model with `trust_remote_code=True`.
            kwargs: everything that transformers' `save_pretrained` takes.
        """
        if with_code:
            self.config.auto_map = auto_map(self.full)
        elif not self.is_remote_code() and getattr(self.config, "auto_map", None):
            del self.config.auto_map  # of the checkpoint it was loaded from; this one has no code
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if with_code:
            copy_code(self.full, save_directory)
        return saved

    def push_to_hub(
        self, repo_id: str, *, processor=None, with_code: bool = False, license: str | None = None,
        commit_message: str | None = None, commit_description: str | None = None, private: bool | None = None,
        token: bool | str | None = None, revision: str | None = None, create_pr: bool = False,
        max_shard_size: int | str | None = "50GB", tags: list[str] | None = None,
    ):  # fmt: skip
        """Upload weights, codebook and settings to one repository, made if missing, with a card unless it has one.

        Args:
            repo_id (`str`): e.g. `"org/llava-next-rbl"`.
            processor (`ProcessorMixin`, *optional*): uploaded with it, so that `pipeline` works on the repository.
            with_code (`bool`, defaults to `False`): see [`~RBLMixin.save_pretrained`].
            license (`str`, *optional*): for the card; that of the base model, as a rule.
            tags (`list[str]`, *optional*): for the card, beside its own.
            others: as in transformers.

        Returns:
            `huggingface_hub.CommitInfo`.
        """
        return push_model(
            self, repo_id, processor, with_code, license, private, token, revision, create_pr, commit_message,
            commit_description, max_shard_size, tags,
        )  # fmt: skip

    @property
    def pruning(self) -> PruningConfig | None:
        """The settings in force, None if there are none. Assign a [`PruningConfig`] (or None) to change them."""
        return None if self.config.pruning is None else PruningConfig.from_dict(self.config.pruning)

    @pruning.setter
    def pruning(self, settings: PruningConfig | dict | None):
        self.config.pruning = None if settings is None else PruningConfig.from_dict(settings).to_dict()

    def set_codebook(self, codebook: RedundancyCodebook) -> None:
        """Prune with a copy of this codebook from now on; `save_pretrained` will include it.

        Raises:
            ValueError: if its width is not the language model's.
        """
        width, expected = codebook.prototypes.shape[1], self.config.get_text_config().hidden_size
        if width != expected:
            made_for = f" (made for {codebook.base_model})" if codebook.base_model else ""
            raise ValueError(
                f"The codebook's prototypes have width {width}{made_for}, but this language model's embeddings have "
                f"width {expected}: it belongs to another model."
            )
        if codebook is not self.base_model.codebook:  # two models must not share, and move, one object
            codebook = copy.deepcopy(codebook)
        device = next(self.base_model.multi_modal_projector.parameters()).device
        self.base_model.register_module("codebook", codebook if device.type == "meta" else codebook.to(device))
        codebook.normalise()
        self.config.num_prototypes, self.config.codebook = len(codebook.prototypes), codebook.metadata()

    def _active_pruning(self, pruning: PruningConfig | dict | None) -> PruningConfig | None:
        """The settings of a call, None if pruning is off."""
        pruning = self.pruning if pruning is None else PruningConfig.from_dict(pruning)
        if pruning is None or not pruning.enabled:
            return None
        if self.base_model.codebook is None and pruning.needs_codebook:
            raise ValueError(
                "Pruning is on, but this model has no codebook: load it with codebook=…, call model.set_codebook(…), "
                "or switch pruning off with PruningConfig(enabled=False)."
            )
        return pruning

    def _prunes(self, call: dict, pruning) -> bool:
        """Whether there is something to prune, or pruned already, in this call; or videos that stock cannot stack."""
        given = [output for output in (call.get("mm_encoder_outputs") or {}).values() if output is not None]
        if any(mask in output for output in given for mask in MASKS.values()):
            return True
        if isinstance(call.get(PIXELS["video"]), (list, tuple)):
            return True
        has_pixels = any(call.get(pixels) is not None for pixels in PIXELS.values())
        return has_pixels and (pruning is not None or self._active_pruning(None) is not None)

    def _labels_beside(self, pruning) -> bool:
        """Whether outputs carry the labels that belong to their logits."""
        pruning = self.pruning if pruning is None else pruning
        return pruning is not None and pruning.enabled and not self.config.full_length_logits

    def _encode(self, call: dict, pruning) -> dict:
        """Visual features by modality, encoded here or passed in. Their arguments leave `call`."""
        features = {
            key: value for key, value in (call.pop("mm_encoder_outputs", None) or {}).items() if value is not None
        }
        if features and pruning is not None:
            raise ValueError("mm_encoder_outputs are encoded already: give pruning= to get_image_features instead.")
        spent = set()
        for modality, pixels in PIXELS.items():
            encode = getattr(self.base_model, f"get_{modality}_features", None)
            if encode is None:
                continue
            names = inspect.signature(encode).parameters.keys() - {"kwargs", "pruning"}
            spent |= names
            if call.get(pixels) is None or len(call[pixels]) == 0:
                continue
            if modality in features:
                raise ValueError(f"Give either {pixels} or mm_encoder_outputs for the {modality}s, not both.")
            arguments = {name: call[name] for name in names if call.get(name) is not None}
            features[modality] = encode(**arguments, pruning=pruning, return_dict=True)
        for name in spent:
            call.pop(name, None)
        return features

    def _placeholders(self, modality: str, input_ids, inputs_embeds) -> torch.Tensor:
        """`(batch, L)` bool: where the prompt waits for visual tokens."""
        token_id = getattr(self.config, f"{modality}_token_id")
        if input_ids is not None:
            return input_ids == token_id
        token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _dropped(self, features: dict, input_ids, inputs_embeds) -> torch.Tensor:
        """`(batch, L)` bool: placeholders of dropped visual tokens. Placeholders and images that do not match raise."""
        prompt = input_ids if input_ids is not None else inputs_embeds[..., 0]
        dropped = torch.zeros(prompt.shape, dtype=torch.bool, device=prompt.device)
        for modality, key in MASKS.items():
            if key not in features.get(modality, {}):
                continue
            masks = features[modality][key]
            slots = self._placeholders(modality, input_ids, inputs_embeds)
            check_placeholders(slots, [len(mask) for mask in masks], modality)
            dropped[slots] = ~torch.cat(list(masks)).to(dropped.device)
        return dropped

    def _compact(self, call: dict, plan: PromptPlan) -> None:
        """Take dropped placeholders out of everything in `call` that runs along the prompt."""
        for name in ("shift_labels", "cu_seq_lens_q", "cu_seq_lens_k"):
            if call.get(name) is not None:
                raise ValueError(f"{name} describes the unpruned prompt and cannot be used with pruning.")
        length = plan.kept.shape[1]
        if call.get("attention_mask") is not None or not plan.attention_mask.all():
            dtype = torch.long if call.get("attention_mask") is None else call["attention_mask"].dtype
            call["attention_mask"] = plan.attention_mask.to(dtype)
        positions = call.get("position_ids")
        call["position_ids"] = plan.positions(None if positions is None else positions[..., -length:])
        if call.get("input_ids") is not None:
            call["input_ids"] = plan.take(call["input_ids"], fill=self._padding_id())
        if call.get("inputs_embeds") is not None:
            call["inputs_embeds"] = plan.take(call["inputs_embeds"])
        for name, fill in ALIGNED.items():
            if call.get(name) is not None:
                call[name] = plan.take(call[name][..., -length:], fill)

    def _padding_id(self) -> int:
        """An id for padding; not a placeholder's."""
        placeholders = {getattr(self.config, f"{modality}_token_id", None) for modality in PIXELS}
        candidates = (self.config.get_text_config().pad_token_id, 0, 1, 2)
        return next(token for token in candidates if token is not None and token not in placeholders)

    def _forward(self, stock, call: dict, pruning):
        """`forward` of both classes: encode, compact, run the stock forward on what is left, say what was kept."""
        cache = claim_cache(call)
        memory = CachedPrompt.of(cache)
        if memory is None and not self._prunes(call, pruning):
            outputs = stock(self, **with_videos_joined(call))
            if call.get("labels") is not None and isinstance(outputs, ModelOutput) and self._labels_beside(pruning):
                outputs["labels"] = call["labels"]  # as in batches with images, which Trainer gathers beside this one
            return outputs

        return_dict = call.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        features = self._encode(call, pruning)
        ids = call.get("input_ids")
        dropped = self._dropped(features, ids, call.get("inputs_embeds"))
        cached = 0 if cache is None else int(cache.get_seq_length())
        if memory is not None:
            memory.check(len(dropped))
        start = cached if memory is None else memory.original_length(cached)

        plan = None
        if memory is not None or dropped.any():
            plan = PromptPlan(dropped, call.get("attention_mask"), start, memory)
            if isinstance(rows := call.get("logits_to_keep"), torch.Tensor):
                call["logits_to_keep"] = kept_rows(plan, rows)
            self._compact(call, plan)
        call["mm_encoder_outputs"] = without_masks(features)
        with forgotten(cache):
            outputs = stock(self, **with_videos_joined(call), return_dict=True)
        extras = {key: features[modality][key] for modality, key in MASKS.items() if key in features.get(modality, {})}
        extras["prompt_mask"] = torch.ones_like(dropped) if plan is None else plan.kept
        if plan is not None and outputs.get(CACHE) is not None and not plan.kept.all():
            known = ids if start == 0 else None
            plan.remember(known, call.get("position_ids")).attach(outputs[CACHE])
        if call.get("labels") is not None:
            extras["labels"] = call["labels"]
        if "logits" in outputs and self.config.full_length_logits:
            extras.pop("labels", None)
            if plan is not None:
                outputs.logits = _full_length(outputs.logits, plan)
                extras["prompt_mask"] = torch.ones_like(dropped)
        if not return_dict:
            return outputs.to_tuple()
        for key, value in extras.items():
            outputs[key] = value
        return outputs


class forgotten:
    """While generation or a stock forward runs on compact prompts, its cache is an ordinary one."""

    def __init__(self, cache):
        self.cache, self.memory = cache, CachedPrompt.of(cache)

    def __enter__(self):
        if hasattr(self.cache, "pruned_prompt"):
            del self.cache.pruned_prompt

    def __exit__(self, *error):
        if self.memory is not None:
            self.cache.pruned_prompt = self.memory


def without_masks(features: dict) -> dict:
    """What stock code gets: features that fit the prompt they come with."""
    return {key: BaseModelOutputWithPooling(pooler_output=output.pooler_output) for key, output in features.items()}


def with_videos_joined(call: dict) -> dict:
    """Stock `forward` reads a batch of videos as one tensor; `generate` needs them apart, to repeat rows for beams."""
    given = call.get("mm_encoder_outputs") or {}
    video = given.get("video")
    if video is None or isinstance(video.pooler_output, torch.Tensor):
        return call
    joined = BaseModelOutputWithPooling(pooler_output=torch.cat(list(video.pooler_output))[None])
    return {**call, "mm_encoder_outputs": {**given, "video": joined}}


def kept_rows(plan: PromptPlan, rows: torch.Tensor) -> torch.Tensor:
    """`logits_to_keep` given as original positions, in the compact prompt."""
    place = plan.kept.long().cumsum(-1) - 1 + (~plan.mask).long().cumprod(-1).sum(-1, keepdim=True)
    if not plan.kept[:, rows].all() or (place[:, rows] != place[:1, rows]).any():
        raise ValueError(
            "logits_to_keep points at dropped or padded positions, or at other places in each row: slice the logits."
        )
    return place[0, rows]


def _full_length(logits: torch.Tensor, plan: PromptPlan) -> torch.Tensor:
    if logits.shape[1] != plan.mask.shape[1]:
        raise ValueError("full_length_logits needs all logits: leave logits_to_keep at 0.")
    side = "right" if plan.mask[:, 0].all() else "left"
    return scatter_to_prompt(logits, plan.kept, side, fill="previous")
