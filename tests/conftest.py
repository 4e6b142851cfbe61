"""Tiny random models of the real architectures, and an oracle: the stock language model run by hand on kept tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor

import tiny_checkpoint
import transformers_rbl
from transformers_rbl import PruningConfig, RedundancyCodebook, kept_token_count


torch.set_num_threads(1)  # models this small gain nothing from more, and on a busy machine threads wait for each other
GREEDY = {"do_sample": False, "max_new_tokens": 8}
# (height, width): one tile, five tiles counting the base image, a strip of three, and a column.
SIZES = [(28, 28), (50, 56), (30, 88), (90, 31)]


@dataclass
class Family:
    name: str
    stock_class: type
    stock_headless: type
    rbl_class: type
    headless_class: type
    folder: Any
    processor: Any
    codebook: RedundancyCodebook

    def stock(self, **kwargs):
        return self.stock_class.from_pretrained(self.folder, **kwargs).eval()

    def pruned(self, **kwargs):
        kwargs = {"codebook": self.codebook, "keep_ratio": 0.3} | kwargs
        return self.rbl_class.from_pretrained(self.folder, **kwargs).eval()

    def images(self, count=4, seed=0):
        random = np.random.RandomState(seed)
        sizes = [SIZES[i % len(SIZES)] for i in range(count)]
        return [Image.fromarray(random.randint(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]

    @property
    def has_tiles(self):
        return self.name != "llava"

    def inputs(self, texts, images=None, side="left", **kwargs):
        """Processor output; `<image>` in a text takes the next image."""
        needed = [text.count("<image>") for text in texts]
        images = self.images(sum(needed)) if images is None and any(needed) else images
        if images and self.name == "llava_onevision":  # lists by prompt: several images in one have no tiles
            rest = iter(images)
            images = [[next(rest) for _ in range(count)] for count in needed if count]
        self.processor.tokenizer.padding_side = side
        return self.processor(images=images or None, text=list(texts), padding=True, return_tensors="pt", **kwargs)


def visual(inputs):
    """What the processor returned beside the text."""
    return {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}


def encoded(output):
    """`(tokens, d)`: the image features of an output, as the installed transformers names and shapes them."""
    if "image_outputs" in output:
        return torch.cat(list(output.image_outputs.pooler_output))
    return output.image_hidden_states


TEXTS = (
    "<s>USER: <image>\nWhat is it? ASSISTANT:",
    "<s>USER: <image>\nHow many? ASSISTANT:",
    "<s>USER: see <image> and <image>, then choose. ASSISTANT:",
    "<s>USER: no picture here. ASSISTANT:",
)
ONE = TEXTS[1:2]


CLASSES = {
    "llava": ("LlavaForConditionalGeneration", "LlavaModel"),
    "llava_next": ("LlavaNextForConditionalGeneration", "LlavaNextModel"),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel"),
}


def make_family(name, folder, **sizes):
    folder = tiny_checkpoint.build(folder, name, **sizes)
    full, headless = CLASSES[name]
    ours = "LlavaOnevision" if name == "llava_onevision" else full
    return Family(
        name,
        getattr(transformers, full),
        getattr(transformers, headless),
        getattr(transformers_rbl, f"{ours}RBL"),
        getattr(transformers_rbl, f"{headless}RBL"),
        folder,
        AutoProcessor.from_pretrained(folder),
        RedundancyCodebook(torch.randn(7, 32, generator=torch.Generator().manual_seed(0))),
    )


@pytest.fixture(scope="session", params=CLASSES)
def family(request, tmp_path_factory):
    """Every test that asks for it runs for every family."""
    return make_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def stock(family):
    return family.stock()


@pytest.fixture(scope="session")
def pruned(family):
    """Shared by tests: never change it."""
    return family.pruned()


@pytest.fixture
def batch(family):
    """Four prompts of different lengths: one image each of two kinds, two images, none."""
    return family.inputs(TEXTS, family.images(4))


@pytest.fixture
def one(family):
    return family.inputs(ONE, family.images(2)[1:])


class Oracle:
    """The method written out: stock features, a loop over tokens, and the stock language model on what is left."""

    def __init__(self, stock, prototypes):
        self.stock, self.prototypes = stock, prototypes

    def keep(self, tokens, newline, pruning: PruningConfig):
        is_newline = [newline is not None and torch.equal(token, newline) for token in tokens]
        patches = [i for i, last in enumerate(is_newline) if not last]
        scores = {i: max(float(torch.cosine_similarity(tokens[i], p, dim=0)) for p in self.prototypes) for i in patches}
        order = sorted(patches, key=lambda i: (scores[i], i))
        if pruning.keep_ratio is not None:
            kept = set(order[: kept_token_count(len(patches), pruning.keep_ratio, pruning.min_tokens)])
        else:
            kept = {i for i in patches if scores[i] < pruning.threshold} | set(order[: pruning.min_tokens])
        return torch.tensor([last or i in kept for i, last in enumerate(is_newline)])

    @torch.no_grad()
    def features(self, inputs):
        if inputs.get("pixel_values") is None:
            return []
        return self.stock.model.get_image_features(**visual(inputs)).pooler_output

    @torch.no_grad()
    def embed(self, inputs, row, pruning):
        """Embeddings `(1, kept, d)` of one prompt, what the mask hides gone, and which of its positions they are."""
        images = self.features(inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        image_id = self.stock.config.image_token_id
        before = int((ids[:row] == image_id).sum())
        newline = getattr(self.stock.model, "image_newline", None)
        masks = [self.keep(tokens, newline, pruning) for tokens in images]
        flat = torch.cat(images) if images else None
        flat_mask = torch.cat(masks) if images else None
        embeds, positions, slot = [], [], before
        for position, token in enumerate(ids[row].tolist()):
            if not mask[row, position]:
                slot += token == image_id  # a hidden placeholder takes its own feature out with it
                continue
            if token == image_id:
                if flat_mask[slot]:
                    embeds.append(flat[slot])
                    positions.append(position)
                slot += 1
            else:
                embeds.append(self.stock.get_input_embeddings().weight[token])
                positions.append(position)
        return torch.stack(embeds)[None], positions

    @torch.no_grad()
    def logits(self, inputs, row, pruning):
        embeds, positions = self.embed(inputs, row, pruning)
        return self.stock(inputs_embeds=embeds).logits[0], positions

    @torch.no_grad()
    def generate(self, inputs, row, pruning, steps=8):
        """Greedy, one full pass a token."""
        embeds, _ = self.embed(inputs, row, pruning)
        new = []
        for _ in range(steps):
            new.append(int(self.stock(inputs_embeds=embeds).logits[0, -1].argmax()))
            if new[-1] == self.stock.generation_config.eos_token_id:
                break
            embeds = torch.cat([embeds, self.stock.get_input_embeddings().weight[new[-1]][None, None]], dim=1)
        return new


@pytest.fixture(scope="session")
def oracle(stock, family):
    return Oracle(stock, family.codebook.prototypes)
