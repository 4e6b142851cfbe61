"""lmms-eval plugin (entry point group `lmms_eval.models`): `python -m lmms_eval --model rbl --model_args pretrained=…`.

Stock and pruned checkpoints of any family that this library prunes, images, several images and video, in real batches,
on any number of processes (`accelerate launch`). What was kept goes into the harness's log, as its throughput figures
do.
"""

# The engine has an environment of its own (tests/engines): where types are checked, it cannot be found.
# pyright: reportMissingImports=false

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.model_utils.load_video import read_video
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor

from ..evaluation.evaluate import prompt_text
from ..models.auto_rbl import rbl_class
from ..models.pruning import PruningConfig
from ..models.seam import ALONG, MASKS


# What a task's `generation_kwargs` may ask for, besides `until`.
GENERATION = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "do_sample",
    "repetition_penalty",
    "length_penalty",
)


def manifest() -> ModelManifest:
    return ModelManifest(model_id="rbl", simple_class_path=f"{__name__}.RBL")


class RBL(lmms):
    """A pruned model in the harness. Its arguments are those of `--model_args`.

    Args:
        pretrained (`str`): folder or Hub id of a checkpoint, stock or saved by our classes.
        codebook, codebook_revision (`str`, *optional*): see [`~RBLMixin.from_pretrained`].
        keep_ratio, threshold (`float`, *optional*): one of them, in place of the checkpoint's settings.
        score, merge, newlines, tiles, frames, keep_positions, min_tokens: see [`PruningConfig`]; they need `keep_ratio`
            or `threshold`.
        prune (`bool`, defaults to `True`): `False` gives the stock model's answers.
        check_base (`bool`, defaults to `True`): refuse a codebook made for another base model.
        revision (`str`, *optional*): of the checkpoint.
        dtype (`str`, defaults to `"auto"`): of the weights.
        device (`str`, *optional*): the harness's `--device`; by default a GPU if there is one. With several processes
            each has its own.
        device_map (`str`, *optional*): to split a model over devices, with one process.
        attn_implementation (`str`, *optional*): as in transformers.
        batch_size (`int`, defaults to 1): the harness's `--batch_size`.
        chat_template (`str`, *optional*): file with a Jinja template, in place of the processor's.
        max_frames (`int`, defaults to 32): of a video, evenly spaced.
        max_new_tokens (`int`, defaults to 1024): where the task does not say.

    Raises:
        ValueError: for unknown arguments, and settings that do not fit.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        codebook: str | None = None,
        keep_ratio: float | None = None,
        threshold: float | None = None,
        score: str | None = None,
        merge: str | None = None,
        newlines: str | None = None,
        tiles: str | None = None,
        frames: str | None = None,
        keep_positions: bool | None = None,
        min_tokens: int | None = None,
        prune: bool = True,
        check_base: bool = True,
        revision: str | None = None,
        codebook_revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        chat_template: str | None = None,
        max_frames: int = 32,
        max_new_tokens: int = 1024,
        **unknown,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"--model rbl does not know {', '.join(sorted(unknown))}.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"--batch_size is a number with --model rbl; got {batch_size!r}.")
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.local_process_index, self.accelerator.num_processes
        if device_map is not None and self._world_size > 1:
            raise ValueError("device_map splits one model over devices: leave it out with several processes.")
        chosen = self.accelerator.device if device is None or self._world_size > 1 else torch.device(device)
        asked = {
            "keep_ratio": keep_ratio,
            "threshold": threshold,
            "score": score,
            "merge": merge,
            "newlines": newlines,
            "tiles": tiles,
            "frames": frames,
            "keep_positions": keep_positions,
            "min_tokens": min_tokens,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        if not prune and asked:
            raise ValueError(f"prune=False is the stock model: {', '.join(asked)} would not be read.")
        pruning = PruningConfig(**asked) if asked else None if prune else PruningConfig(enabled=False)
        self.model = (
            rbl_class(pretrained, revision=revision)
            .from_pretrained(
                pretrained,
                revision=revision,
                codebook=codebook,
                codebook_revision=codebook_revision,
                pruning=pruning,
                check_base=check_base,
                dtype=dtype,
                device_map=device_map or chosen,
                attn_implementation=attn_implementation,
            )
            .eval()
        )
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision)
        self.processor.tokenizer.padding_side = "left"
        if chat_template is not None:
            with open(chat_template, encoding="utf-8") as file:
                self.processor.chat_template = file.read()
        self.batch_size, self.max_frames, self.max_new_tokens = int(batch_size), max_frames, max_new_tokens
        self.settings = None if self.model.pruning is None else self.model.pruning.to_dict()
        logger.info(f"Pruning settings: {self.settings}")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests, which go through the model in batches of like settings."""
        answers = [""] * len(requests)
        kept = whole = images = said = 0
        began = time.perf_counter()
        bar = tqdm(total=len(requests), disable=self._rank != 0, desc="Model Responding")
        for indices in self._batches(requests):
            asked = [requests[index].args for index in indices]
            inputs = self._inputs([args[0] for args in asked], [self._visuals(*args[2:6]) for args in asked])
            settings, until = self._generation(asked[0][1])
            output = self.model.generate(**inputs, **settings, return_dict_in_generate=True)
            ids = output.sequences[:, inputs["input_ids"].shape[1] :]
            for index, text in zip(indices, self.processor.batch_decode(ids, skip_special_tokens=True)):
                answers[index] = cut(text.strip(), until)
                self.cache_hook.add_partial("generate_until", (requests[index].args[0], settings), answers[index])
            counts = self._counts(inputs, output)
            kept, whole, images = kept + counts[0], whole + counts[1], images + counts[2]
            said += int((ids != self.processor.tokenizer.pad_token_id).sum())
            bar.update(len(indices))
        bar.close()
        seconds, count = time.perf_counter() - began, len(requests)
        if self._world_size > 1:
            own = torch.tensor([kept, whole, images, said, count], device=self.accelerator.device)
            kept, whole, images, said, count = torch.as_tensor(self.accelerator.reduce(own)).tolist()
        log_metrics(
            seconds,
            said,
            said / seconds if seconds else 0.0,
            {
                "visual_tokens": whole / max(images, 1),
                "visual_tokens_kept": kept / max(images, 1),
                "total_requests": count,
            },
        )
        logger.info(f"Kept {kept} of {whole} visual tokens of {images} images and videos, with {self.settings}")
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Per request the mean negative log-likelihood of the continuation (the harness takes the lowest, as its own
        models return it), and whether greedy decoding would say it."""
        found = []
        for request in tqdm(requests, disable=self._rank != 0, desc="Model Responding"):
            context, continuation, *visual = request.args
            if callable(continuation):
                continuation = continuation(self.task_dict[visual[2]][visual[3]][visual[1]])
            ids = self.processor.tokenizer(continuation, add_special_tokens=False, return_tensors="pt").input_ids
            ids = ids.to(self.model.device)
            inputs = self._inputs([context], [self._visuals(*visual) if visual else []])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            for name in [name for name in ALONG if name in inputs]:  # the continuation is text
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, ids.shape[1]))
            length = ids.shape[1]
            logits = self.model(**inputs, logits_to_keep=length + 1).logits[0, -length - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0])
            found.append((loss.item(), bool((logits.argmax(-1) == ids[0]).all())))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("--model rbl does not run tasks of several rounds.")

    def _batches(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Indices of requests of the same generation settings, long questions first."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for group in groups.values():
            group.sort(key=lambda index: -len(requests[index].args[0]))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _visuals(self, doc_to_visual: Callable, doc_id: int, task: str, split: str) -> list:
        """A document's images (RGB), or its videos (paths)."""
        found = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for visual in found:
            if not isinstance(visual, (Image.Image, str)):
                raise ValueError(f"Task {task} gives a {type(visual).__name__}; images and paths of videos are known.")
        if len({isinstance(visual, str) for visual in found}) > 1:
            raise ValueError(f"Task {task} mixes images and videos in one question, which --model rbl does not take.")
        return [visual if isinstance(visual, str) else visual.convert("RGB") for visual in found]

    def _inputs(self, contexts: list[str], visuals: list[list]):
        """What the processor makes of a batch of questions with their images or videos, or with none."""
        texts, images, videos = [], [], []
        for context, own in zip(contexts, visuals, strict=True):
            is_video = bool(own) and isinstance(own[0], str)
            if is_video and not hasattr(self.processor, "video_processor"):
                raise ValueError(f"{type(self.model).__name__} takes no video: choose tasks with images.")
            texts.append(prompt_text(self.processor, context, len(own), "video" if is_video else "image"))
            if is_video:
                videos += [read_video(path, num_frm=self.max_frames) for path in own]
            elif own:
                images.append(own)
        given = {"images": images} if images else {}
        given |= {"videos": videos} if videos else {}
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **given)
        return inputs.to(self.model.device, self.model.dtype)

    def _generation(self, asked: dict) -> tuple[dict, list[str]]:
        """Arguments of `generate`, and strings that end an answer."""
        asked = {name: value for name, value in asked.items() if value is not None}
        until = asked.pop("until", [])
        until = [until] if isinstance(until, str) else list(until)
        if unread := sorted(set(asked) - set(GENERATION)):
            logger.warning(f"The task's generation settings {', '.join(unread)} are not read by --model rbl.")
        settings = {name: asked[name] for name in GENERATION if name in asked}
        settings.setdefault("max_new_tokens", self.max_new_tokens)
        settings["do_sample"] = bool(settings.get("do_sample", settings.get("temperature", 0) > 0))
        if not settings["do_sample"]:
            for name in ("temperature", "top_p", "top_k"):
                settings.pop(name, None)
        return settings, until

    def _counts(self, inputs: Any, output: Any) -> tuple[int, int, int]:
        """Visual tokens kept, visual tokens in all, and images and videos, of a batch."""
        masks = [mask for key in MASKS.values() for mask in output.get(key) or ()]
        if masks:
            return sum(int(mask.sum()) for mask in masks), sum(map(len, masks)), len(masks)
        tokens = {self.model.config.image_token_id, getattr(self.model.config, "video_token_id", None)} - {None}
        whole = sum(int((inputs["input_ids"] == token).sum()) for token in tokens)
        starts = torch.isin(inputs["input_ids"], torch.tensor(list(tokens), device=inputs["input_ids"].device)).int()
        return whole, whole, int((starts.diff(dim=1, prepend=starts[:, :1] * 0) == 1).sum())


def cut(text: str, until: list[str]) -> str:
    """The text before the first of these strings."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]
