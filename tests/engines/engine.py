"""One vLLM engine in a process of its own: `python engine.py JOB.json OUT.json`.

A job: `{"model", "engine": {…}, "rounds": [[{"prompt", "images": [paths], "embeds": [paths], "video": path,
"keep_ratio"}]], "max_tokens", "logprobs", "mutation"}`. For every request the answer's ids, the prompt's length, how
much of it the prefix cache held, and the likeliest tokens' log-probabilities at each step; and of every round how many
images and videos were encoded.
"""

import json
import sys

import numpy as np
import torch
from PIL import Image


def request(asked: dict) -> dict:
    data = [Image.open(path).convert("RGB") for path in asked.get("images", ())]
    data += [torch.load(path, weights_only=True) for path in asked.get("embeds", ())]
    made = {"prompt": asked["prompt"]}
    if data:
        made["multi_modal_data"] = {"image": data}
    if "video" in asked:
        frames = np.load(asked["video"])
        made["multi_modal_data"] = {"video": [(frames, video_metadata(len(frames)))]}
    if "keep_ratio" in asked:
        made["mm_processor_kwargs"] = {"keep_ratio": asked["keep_ratio"]}
    return made


def video_metadata(frames: int) -> dict:
    """Two frames a second, all of them sampled already."""
    said = {"fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames))}
    return {**said, "video_backend": "opencv", "do_sample_frames": False}


def answer(output) -> dict:
    said = output.outputs[0]
    steps = [{str(token): entry.logprob for token, entry in step.items()} for step in said.logprobs or ()]
    lengths = {"prompt": len(output.prompt_token_ids), "cached": output.num_cached_tokens or 0}
    return {"ids": list(said.token_ids), **lengths, "logprobs": steps}


def mutate(name: str) -> None:
    """Break the plugin in one of the ways that vLLM would not notice."""
    from transformers_rbl.integrations import vllm_models

    right = {"kept": vllm_models.kept_of_image, "count": vllm_models.VisualLayout.kept_count}

    def kept(tokens, layout, pruning, codebook, width):
        mask = right["kept"](tokens, layout, pruning, codebook, width)[1]
        if name == "too many":
            mask = torch.ones_like(mask)
        if name == "too few":
            mask[mask.nonzero()[-3:, 0]] = False
        return tokens[mask], mask

    def count(layout, pruning):
        return right["count"](layout, pruning) - (name == "another ratio in the processor")

    vllm_models.kept_of_image, vllm_models.VisualLayout.kept_count = kept, count
    if name == "positions without rows and columns":
        from transformers_rbl.integrations import vllm_qwen

        places = vllm_qwen.offsets
        vllm_qwen.offsets = lambda times, grid: torch.zeros_like(places(times, grid))


def count_encoded() -> list[int]:
    """Counts what the model encodes from here on, in a list of one number; this process alone."""
    from transformers_rbl.integrations import vllm_models

    encoded, keep = [0], vllm_models.RBLModel._keep

    def counted(*args):
        encoded[0] += 1
        return keep(*args)

    vllm_models.RBLModel._keep = counted
    return encoded


def main(job_path: str, out_path: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    job = json.load(open(job_path))
    if job.get("mutation"):
        mutate(job["mutation"])
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8, "seed": 0}
    settings["limit_mm_per_prompt"] = {"image": 2}
    engine = LLM(model=job["model"], **{**settings, **job.get("engine", {})})
    sampling = SamplingParams(
        max_tokens=job.get("max_tokens", 8), temperature=0, ignore_eos=True, logprobs=job.get("logprobs")
    )
    rounds, encoded, counts = [], count_encoded(), []
    for asked in job["rounds"]:
        try:
            outputs = engine.generate([request(one) for one in asked], sampling, use_tqdm=False)
            rounds.append([answer(output) for output in outputs])
        except (ValueError, AssertionError, VLLMValidationError) as error:  # vLLM asserts that prompts and images match
            rounds.append({"error": str(error)})
        counts.append(encoded[0])
        encoded[0] = 0
    json.dump({"rounds": rounds, "encoded": counts}, open(out_path, "w"))


if __name__ == "__main__":
    main(*sys.argv[1:])
