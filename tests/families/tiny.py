"""Tiny random models of every family, and prompts built by hand as the families' processors build them.

A `Case` is what a family needs: a config, and how one image (and one video) of a given size comes as ids and tensors.
`Case.inputs` joins prompts, which are lists of word ids and pictures, to a left-padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import is_timm_available


PAD, BOS, EOS, IMAGE, VIDEO, START, END, BREAK, VIDEO_START, VIDEO_END = range(10)
MARKS = (START, END, BREAK, VIDEO_START, VIDEO_END)
FIRST_WORD, VOCABULARY, WIDTH = 16, 64, 32
# What a random model must not say: a placeholder or mark in an answer is read as an image in the next turn.
SPECIAL = [token for token in range(FIRST_WORD) if token != EOS]

Size = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """One image or video in a prompt.

    Args:
        ids (`list[int]`): its placeholders, with the marks that the family's processor writes around them.
        tensors (`dict[str, torch.Tensor]`): what the processor returns for it alone.
        parts (`list[int]`): numbers of visual tokens that share one budget, row ends left out.
        ends (`frozenset[int]`): which of its visual tokens are row ends, counted from its first.
        modality (`str`): `"image"` or `"video"`.
        placeholder (`int`): the id that stands for a visual token.
        typed_marks (`bool`): token types count its marks as image.
    """

    ids: list[int]
    tensors: dict[str, torch.Tensor]
    parts: list[int]
    ends: frozenset[int] = frozenset()
    modality: str = "image"
    placeholder: int = IMAGE
    typed_marks: bool = False

    def __len__(self) -> int:
        return self.ids.count(self.placeholder)


Prompt = list  # of `list[int]` (words) and `Picture`
Draw = Callable[..., torch.Tensor]  # random numbers of a shape


@dataclass(frozen=True)
class Case:
    """One family.

    Args:
        model_type (`str`): transformers' name of it.
        config (`Callable`): makes its config.
        image (`Callable`): `(size, draw) -> Picture`.
        sizes (`tuple`): three sizes of images; what a size means is the family's: tiles, or rows and columns.
        types (`str`, *optional*): the argument that tells images from text.
        prefix (`bool`): what it tells is a first turn (0) from what follows (1), images or not.
        joined_by_prompt (`bool`): tensors have one row per prompt, not per image.
        points (`dict[str, str]`): tensors that hold places among all patches of another, negative where there is none.
        fill (`dict`): what pads tensors to one shape, where it is not zero.
        video (`Callable`, *optional*): `(frames, size, draw) -> Picture`.
        timm (`bool`): its tower comes from that library.
        core (`bool`): in the default run; the others are marked slow.
    """

    model_type: str
    config: Callable[[], PreTrainedConfig]
    image: Callable[[Size, Draw], Picture]
    sizes: tuple[Size, Size, Size] = ((3, 4), (5, 2), (2, 3))
    types: str | None = None
    prefix: bool = False
    joined_by_prompt: bool = False
    points: dict[str, str] = field(default_factory=dict)
    fill: dict[str, float] = field(default_factory=dict)
    video: Callable[[int, Size, Draw], Picture] | None = None
    timm: bool = False
    core: bool = False

    @property
    def installed(self) -> bool:
        return self.model_type in CONFIG_MAPPING and (not self.timm or is_timm_available())

    @property
    def stock(self) -> type:
        """The full stock class."""
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[self.model_type]]

    def build(self, folder: Path) -> Path:
        """A random model whose answers depend on its images, saved by stock."""
        torch.manual_seed(0)
        model: Any = self.stock(self.config())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2:
                    weight.normal_(0, 0.15 if weight.shape[-1] > 8 else 0.3)
                elif not name.endswith("bias") and not weight.any():
                    weight.normal_(0, 0.2)
        model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
        model.save_pretrained(folder)
        return folder

    def pictures(self, seed: int = 0) -> list[Picture]:
        """Three images of different sizes, where the family has sizes."""
        generator = torch.Generator().manual_seed(seed)
        return [self.image(size, drawing(generator)) for size in self.sizes]

    def movies(self, seed: int = 0) -> list[Picture]:
        """Two videos of different lengths."""
        assert self.video is not None
        generator = torch.Generator().manual_seed(seed)
        return [self.video(frames, (2, 3), drawing(generator)) for frames in (3, 2)]

    def inputs(self, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
        """What the processor returns for these prompts, padded on the left."""
        ids = [[token for item in prompt for token in _ids(item)] for prompt in prompts]
        types = [[0 if self.prefix else kind for item in prompt for kind in _types(item)] for prompt in prompts]
        longest = max(map(len, ids))
        batch = {
            "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in ids]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
            **self.visual(prompts),
        }
        if self.types:
            batch[self.types] = torch.tensor([[0] * (longest - len(row)) + row for row in types])
        return batch

    def visual(self, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
        """The tensors of all pictures, in order."""
        rows = [[item.tensors for item in prompt if isinstance(item, Picture)] for prompt in prompts]
        if self.joined_by_prompt and any(rows):
            empty = {name: value[:0] for name, value in next(row for row in rows if row)[0].items()}
            return self._cat([{n: v[None] for n, v in self._cat(row or [empty]).items()} for row in rows])
        return self._cat([tensors for row in rows for tensors in row])

    def _cat(self, tensors: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        for name, pixels in self.points.items():
            move, moved = 0, []
            for item in tensors:
                own = {name: item[name].where(item[name] < 0, item[name] + move)} if name in item else {}
                move += item[pixels].shape[0] * item[pixels].shape[1] if own else 0
                moved.append({**item, **own})
            tensors = moved
        names = dict.fromkeys(name for item in tensors for name in item)
        return {name: self._padded_cat(name, [item[name] for item in tensors if name in item]) for name in names}

    def _padded_cat(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values))]
        padded = []
        for value in values:
            room = value.new_full((len(value), *shape), self.fill.get(name, 0))
            room[(slice(None), *map(slice, value.shape[1:]))] = value
            padded.append(room)
        return torch.cat(padded)


def words(count: int, seed: int = 0) -> list[int]:
    """Ids of text."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator).tolist()


def drawing(generator: torch.Generator) -> Draw:
    return lambda *shape: torch.randn(*shape, generator=generator)


def _ids(item: list[int] | Picture) -> list[int]:
    return item.ids if isinstance(item, Picture) else item


def _types(item: list[int] | Picture) -> list[int]:
    if not isinstance(item, Picture):
        return [0] * len(item)
    kind = 1 if item.modality == "image" else 2
    if item.typed_marks:
        return [1 if token in (item.placeholder, *MARKS) else 0 for token in item.ids]
    return [kind if token == item.placeholder else 0 for token in item.ids]


# How pictures come ----------------------------------------------------------------------------------------------------


def tiles(tokens: int, side: int, shared: bool = False, marks: tuple[list[int], list[int]] = ([START], [END]),
          between: Sequence[int] = (), between_two: Sequence[int] = (), after: Sequence[int] = ()
          ) -> Callable[[Size, Draw], Picture]:  # fmt: skip
    """Images of `rows * columns` tiles; each tile has a budget, or all share one. Marks in text stand before each tile
    (`between`), between any two, or after each."""

    def image(size: Size, draw: Draw) -> Picture:
        count = size[0] * size[1]
        tile = [*between, *[IMAGE] * tokens, *after]
        return Picture(
            [*marks[0], *tile, *[*between_two, *tile] * (count - 1), *marks[1]],
            {"pixel_values": draw(count, 3, side, side)},
            [tokens * count] if shared else [tokens] * count,
        )

    return image


def anyres(patches: int = 4, side: int = 28) -> Callable[[Size, Draw], Picture]:
    """LLaVA-NeXT's: a thumbnail, then the rows of a grid of tiles, each with a row end."""

    def image(size: Size, draw: Draw) -> Picture:
        rows, columns = (patches * n for n in size)
        base = patches**2
        ends = frozenset(base + (columns + 1) * (row + 1) - 1 for row in range(rows))
        return Picture(
            [START, *[IMAGE] * (base + rows * (columns + 1)), END],
            {
                "pixel_values": draw(1, 1 + size[0] * size[1], 3, side, side),
                "image_sizes": torch.tensor([[size[0] * side, size[1] * side]]),
            },
            [base + rows * columns],
            ends,
        )

    return image


def frames_of_tiles(tokens: int, side: int) -> Callable[[int, Size, Draw], Picture]:
    """LLaVA-NeXT-Video's: frames side by side, one budget."""

    def video(frames: int, size: Size, draw: Draw) -> Picture:
        pixels = {"pixel_values_videos": draw(1, frames, 3, side, side)}
        return Picture(
            [START, *[VIDEO] * (frames * tokens), END], pixels, [frames * tokens], frozenset(), "video", VIDEO
        )

    return video


def native(patch: int, temporal: int = 2, merge: int = 2) -> Callable[[Size, Draw], Picture]:
    """Qwen-VL's: one grid of merged patches, of any shape."""

    def image(size: Size, draw: Draw) -> Picture:
        return _grid(1, size, draw, patch, temporal, merge, "image")

    return image


def native_unfolded(patch: int) -> Callable[[Size, Draw], Picture]:
    """PaddleOCR-VL's: as Qwen-VL's, of patches that are not flattened."""

    def image(size: Size, draw: Draw) -> Picture:
        picture = _grid(1, size, draw, patch, 1, 2, "image")
        picture.tensors["pixel_values"] = picture.tensors["pixel_values"].view(-1, 3, patch, patch)
        return picture

    return image


def native_video(patch: int, timestamps: bool, as_images: bool = False, temporal: int = 2, merge: int = 2
                 ) -> Callable[[int, Size, Draw], Picture]:  # fmt: skip
    """Qwen-VL's: one grid per temporal patch, side by side or behind timestamps; GLM-4V's placeholders are images'."""

    def video(frames: int, size: Size, draw: Draw) -> Picture:
        tensors = _grid(frames, size, draw, patch, temporal, merge, "video").tensors
        tokens, placeholder = size[0] * size[1], IMAGE if as_images else VIDEO
        if timestamps:
            ids = [token for n in range(frames) for token in (FIRST_WORD + n, START, *[placeholder] * tokens, END)]
        else:
            ids = [START, *[placeholder] * (frames * tokens), END]
        if as_images:
            ids = [VIDEO_START, *ids, VIDEO_END]
        return Picture(ids, tensors, [frames * tokens], frozenset(), "video", placeholder)

    return video


def _grid(frames: int, size: Size, draw: Draw, patch: int, temporal: int, merge: int, modality: str) -> Picture:
    rows, columns = size
    pixels = draw(frames * rows * columns * merge**2, 3 * temporal * patch**2)
    names = ("pixel_values", "image_grid_thw") if modality == "image" else ("pixel_values_videos", "video_grid_thw")
    tensors = dict(zip(names, (pixels, torch.tensor([[frames, rows * merge, columns * merge]]))))
    return Picture([START, *[IMAGE] * (rows * columns), END], tensors, [frames * rows * columns])


def pixtral(size: Size, draw: Draw) -> Picture:
    """Mistral 3's: a row of merged patches, then a mark in text; the last row ends with another."""
    rows, columns = size
    ids = [*(([IMAGE] * columns + [BREAK]) * rows)[:-1], END]
    height, width = rows * 14, columns * 14
    sizes = torch.tensor([[height, width]])
    return Picture(ids, {"pixel_values": draw(1, 3, height, width), "image_sizes": sizes}, [rows * columns])


def siglip2(size: Size, draw: Draw) -> Picture:
    """LFM2-VL's: two tiles behind marks in text, each flat patches, a mask and a shape."""
    rows, columns = size
    patches = rows * columns * 4
    tensors = {
        "pixel_values": draw(2, patches, 3 * 7 * 7),
        "pixel_attention_mask": torch.ones(2, patches, dtype=torch.long),
        "spatial_shapes": torch.tensor([[2 * rows, 2 * columns]] * 2),
    }
    tile = [BREAK, *[IMAGE] * (rows * columns)]
    return Picture([START, *tile, *tile, END], tensors, [rows * columns] * 2)


def pooled(size: Size, draw: Draw) -> Picture:
    """Gemma 4's: flat patches and their places."""
    rows, columns = size
    y, x = torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij")
    tensors = {
        "pixel_values": draw(1, rows * columns * 4, 3 * 8 * 8).sigmoid(),
        "image_position_ids": torch.stack([x.flatten(), y.flatten()], -1)[None],
    }
    return Picture([START, *[IMAGE] * (rows * columns), END], tensors, [rows * columns])


def frames_of_pooled(frames: int, size: Size, draw: Draw) -> Picture:
    """Gemma 4's: frames behind timestamps."""
    images = [pooled(size, draw).tensors for _ in range(frames)]
    tokens = size[0] * size[1]
    ids = [token for n in range(frames) for token in (FIRST_WORD + n, START, *[VIDEO] * tokens, END)]
    tensors = {
        "pixel_values_videos": torch.cat([image["pixel_values"] for image in images]),
        "video_position_ids": torch.cat([image["image_position_ids"] for image in images]),
        "num_frames_per_video": torch.tensor([frames]),
    }
    return Picture(ids, tensors, [frames * tokens], frozenset(), "video", VIDEO)


def overlapping_crops(size: Size, draw: Draw) -> Picture:
    """Molmo 2's: a thumbnail of 2 x 2 tokens, then one grid over two crops; rows end with marks in text. A token pools
    up to four patches, fewer at the edge."""
    rows, columns = size
    grid = torch.arange(2 * rows * 2 * columns).view(2 * rows, 2 * columns) % 32 + 16
    windows = grid.view(rows, 2, columns, 2).transpose(1, 2).reshape(rows * columns, 4).clone()
    windows[-1, 2:] = -1
    low = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    tensors = {
        "pixel_values": draw(3, 16, 3 * 7 * 7),
        "image_token_pooling": torch.cat([low, windows]),
        "image_grids": torch.tensor([[2, 2, rows, columns]]),
    }
    base, high = [*[IMAGE] * 2, BREAK] * 2, [*[IMAGE] * columns, BREAK] * rows
    return Picture([START, *base, END, START, *high, END], tensors, [4 + rows * columns], typed_marks=True)


def crops_of_frames(frames: int, size: Size, draw: Draw) -> Picture:
    """Molmo 2's: each frame is one crop between marks, behind a timestamp."""
    low = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    tensors = {
        "pixel_values_videos": draw(frames, 16, 3 * 7 * 7),
        "video_token_pooling": torch.cat([low + 16 * frame for frame in range(frames)]),
        "video_grids": torch.tensor([[frames, 2, 2]]),
    }
    ids = [token for n in range(frames) for token in (FIRST_WORD + n, START, *[IMAGE] * 4, END)]
    return Picture(ids, tensors, [4 * frames], frozenset(), "video", IMAGE, typed_marks=True)


def thumbnail_and_tiles(size: Size, draw: Draw) -> Picture:
    """Perception LM's: all images of a call have as many tiles, the thumbnail first, side by side in the prompt."""
    tiles = 1 + size[0] * size[1]
    return Picture([IMAGE] * (4 * tiles), {"pixel_values": draw(1, tiles, 3, 28, 28)}, [4 * tiles])


def moonvit_video(frames: int, size: Size, draw: Draw) -> Picture:
    """Kimi's: chunks of up to four frames, each averaged over time to one grid, behind timestamps."""
    rows, columns = size
    chunks = [2] * (frames // 2) + [1] * (frames % 2)
    tokens, patches = rows * columns, rows * columns * 4
    tensors = {
        "pixel_values_videos": draw(frames * patches, 3, 7, 7),
        "video_grid_thw": torch.tensor([[chunk, 2 * rows, 2 * columns] for chunk in chunks]),
    }
    ids = [token for n in range(len(chunks)) for token in (FIRST_WORD + n, START, *[VIDEO] * tokens, END)]
    return Picture(ids, tensors, [tokens] * len(chunks), frozenset(), "video", VIDEO)


def moonvit(size: Size, draw: Draw) -> Picture:
    """Kimi's: patches of any shape, not flattened."""
    rows, columns = size
    tensors = {
        "pixel_values": draw(rows * columns * 4, 3, 7, 7),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }
    return Picture([START, *[IMAGE] * (rows * columns), END], tensors, [rows * columns])


# Configs --------------------------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = dict(
    hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=BOS,
    eos_token_id=EOS, tie_word_embeddings=False,
)  # fmt: skip
TOWER: dict[str, Any] = dict(
    hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=7
)
SIGLIP = TOWER | dict(model_type="siglip_vision_model", vision_use_head=False)
CLIP = TOWER | dict(model_type="clip_vision_model", num_hidden_layers=3, projection_dim=WIDTH)
SMALL_CLIP = CLIP | dict(image_size=28)
IMAGE_ID: dict[str, Any] = dict(image_token_id=IMAGE, tie_word_embeddings=False)
OLD_IMAGE_ID = IMAGE_ID | dict(image_token_index=IMAGE)
VISION_IDS = IMAGE_ID | dict(video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
QWEN_TEXT = {name: value for name, value in TEXT.items() if name not in ("head_dim", "tie_word_embeddings")}
ROPE: dict[str, Any] = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])
QWEN3_TOWER: dict[str, Any] = dict(
    hidden_size=WIDTH, intermediate_size=64, out_hidden_size=WIDTH, depth=3, num_heads=4, patch_size=8,
    spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=64,
)  # fmt: skip
QWEN3_TEXT = QWEN_TEXT | dict(
    head_dim=8, num_hidden_layers=4, rope_parameters=ROPE | dict(mrope_interleaved=True)
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
QWEN3_5_TEXT = QWEN3_TEXT | dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_conv_kernel_dim=4, layer_types=["linear_attention", "full_attention"] * 2,
    rope_parameters=ROPE | dict(mrope_interleaved=True, partial_rotary_factor=1.0),
)  # fmt: skip
GLM: dict[str, Any] = dict(
    vision_config=dict(
        hidden_size=WIDTH, intermediate_size=64, out_hidden_size=WIDTH, depth=2, num_heads=4, patch_size=7,
        image_size=56, spatial_merge_size=2, temporal_patch_size=2,
    ),
    text_config=QWEN_TEXT | dict(rope_parameters=ROPE | dict(partial_rotary_factor=1.0)),
    image_start_token_id=START, image_end_token_id=END, video_start_token_id=VIDEO_START, video_end_token_id=VIDEO_END,
    video_token_id=VIDEO, **IMAGE_ID,
)  # fmt: skip
PINPOINTS = [[28 * rows, 28 * columns] for rows in (1, 2) for columns in (1, 2, 3)]


def _config(name: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    """Made when a test asks for it, since an older transformers may lack the class."""
    return lambda: getattr(transformers, name)(
        **{key: value() if callable(value) else value for key, value in settings.items()}
    )


def _text(name: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, name)(**{**TEXT, **settings})


TILES = ((1, 2), (2, 2), (1, 1))
ONE_TILE = ((1, 1), (1, 1), (1, 1))

CASES: dict[str, Case] = {
    case.model_type: case
    for case in (
        Case(
            "llava",
            _config("LlavaConfig", vision_config=SMALL_CLIP, text_config=_text("LlamaConfig"), **OLD_IMAGE_ID),
            tiles(16, 28), ONE_TILE,
        ),
        Case(
            "llava_next",
            _config("LlavaNextConfig", vision_config=SMALL_CLIP, text_config=_text("LlamaConfig"),
                    image_grid_pinpoints=PINPOINTS, **OLD_IMAGE_ID),
            anyres(), TILES,
        ),
        Case(
            "llava_next_video",
            _config("LlavaNextVideoConfig", vision_config=SMALL_CLIP, text_config=_text("LlamaConfig"),
                    image_grid_pinpoints=PINPOINTS, video_token_id=VIDEO, video_token_index=VIDEO,
                    **OLD_IMAGE_ID),
            anyres(), TILES, video=frames_of_tiles(4, 28),
        ),
        Case(
            "llava_onevision",
            _config("LlavaOnevisionConfig", vision_config=SIGLIP | dict(image_size=28), vision_feature_layer=-1,
                    text_config=_text("Qwen2Config"), image_grid_pinpoints=PINPOINTS, video_token_id=VIDEO,
                    video_token_index=VIDEO, **OLD_IMAGE_ID),
            anyres(), TILES,
        ),
        Case(
            "internvl",
            _config("InternVLConfig", text_config=_text("Qwen2Config"), image_seq_length=16, downsample_ratio=0.5,
                    vision_config=TOWER | dict(image_size=[56, 56], patch_size=[7, 7]), **IMAGE_ID),
            tiles(16, 56, shared=True), TILES, core=True,
        ),
        Case(
            "smolvlm",
            _config("SmolVLMConfig", vision_config=TOWER, text_config=_text("LlamaConfig"), scale_factor=2,
                    pad_token_id=PAD, **IMAGE_ID),
            tiles(16, 56, between=[START]), TILES, joined_by_prompt=True, core=True,
        ),
        Case(
            "idefics3",
            _config("Idefics3Config", vision_config=TOWER, text_config=_text("LlamaConfig"), scale_factor=2,
                    pad_token_id=PAD, **IMAGE_ID),
            tiles(16, 56, between=[START]), TILES, joined_by_prompt=True,
        ),
        Case(
            "gemma3",
            _config("Gemma3Config", vision_config=SIGLIP, mm_tokens_per_image=16, boi_token_index=START,
                    text_config=_text("Gemma3TextConfig", sliding_window=24, query_pre_attn_scalar=8,
                                      layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
                    eoi_token_index=END, **OLD_IMAGE_ID),
            tiles(16, 56), ONE_TILE, types="token_type_ids", core=True,
        ),
        Case(
            "gemma4",
            _config("Gemma4Config", audio_config=None, video_token_id=VIDEO, boi_token_id=START, eoi_token_id=END,
                    audio_token_id=11,
                    vision_config=dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=4, num_key_value_heads=4, head_dim=8, patch_size=8,
                                       pooling_kernel_size=2, position_embedding_size=64, default_output_length=16),
                    text_config=_text("Gemma4TextConfig", sliding_window=24, num_hidden_layers=4, global_head_dim=8,
                                      hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
                                      num_kv_shared_layers=0, use_bidirectional_attention="vision",
                                      layer_types=["sliding_attention", "full_attention"] * 2),
                    **IMAGE_ID),
            pooled, ((3, 4), (4, 2), (2, 3)), types="mm_token_type_ids",
            fill={"image_position_ids": -1, "video_position_ids": -1}, video=frames_of_pooled,
        ),
        Case(
            "paligemma",
            _config("PaliGemmaConfig", vision_config=SIGLIP | dict(projection_dim=WIDTH), projection_dim=WIDTH,
                    text_config=_text("GemmaConfig"), hidden_size=WIDTH, image_token_id=IMAGE,
                    image_token_index=IMAGE),
            tiles(64, 56, marks=([], [])), ONE_TILE, types="token_type_ids", prefix=True,
        ),
        Case(
            "mistral3",
            _config("Mistral3Config", spatial_merge_size=2, vision_feature_layer=-1,
                    vision_config=TOWER | dict(model_type="pixtral", image_size=140, head_dim=8),
                    text_config=_text("MistralConfig", sliding_window=None), **OLD_IMAGE_ID),
            pixtral, core=True,
        ),
        Case(
            "aya_vision",
            _config("AyaVisionConfig", vision_config=SIGLIP, text_config=_text("Cohere2Config", sliding_window=32),
                    downsample_factor=2, vision_feature_layer=-1, vision_feature_select_strategy="full",
                    **OLD_IMAGE_ID | dict(tie_word_embeddings=True)),
            tiles(16, 56, between=[BREAK]), TILES,
        ),
        Case(
            "cohere2_vision",
            _config("Cohere2VisionConfig", vision_config=SIGLIP, downsample_factor=2, alignment_intermediate_size=64,
                    text_config=_text("Cohere2Config", sliding_window=32),
                    **IMAGE_ID | dict(tie_word_embeddings=True)),
            tiles(16, 56, shared=True, after=[BREAK]), TILES,
        ),
        Case(
            "vipllava",
            _config("VipLlavaConfig", vision_config=CLIP, text_config=_text("LlamaConfig"),
                    vision_feature_layers=[-3, -2], **OLD_IMAGE_ID),
            tiles(64, 56), ONE_TILE,
        ),
        Case(
            "got_ocr2",
            _config("GotOcr2Config", text_config=_text("Qwen2Config"),
                    vision_config=dict(hidden_size=WIDTH, output_channels=16, num_hidden_layers=2,
                                       num_attention_heads=4, image_size=128, patch_size=16, window_size=4,
                                       mlp_dim=64, global_attn_indexes=[1]),
                    **OLD_IMAGE_ID),
            tiles(4, 128, shared=True), ((2, 3), (2, 2), (1, 1)),
        ),
        Case(
            "lfm2_vl",
            _config("Lfm2VlConfig", downsample_factor=2, projector_hidden_size=WIDTH,
                    vision_config=dict(model_type="siglip2_vision_model", hidden_size=WIDTH, intermediate_size=64,
                                       num_hidden_layers=2, num_attention_heads=4, num_patches=64, patch_size=7,
                                       vision_use_head=False),
                    text_config=_text("Lfm2Config", layer_types=["conv", "full_attention", "conv"],
                                      block_multiple_of=8),
                    **IMAGE_ID | dict(tie_word_embeddings=True)),
            siglip2,
        ),
        Case(
            "deepseek_vl",
            _config("DeepseekVLConfig", vision_config=SIGLIP, text_config=_text("LlamaConfig"), **IMAGE_ID),
            tiles(64, 56, marks=([], [])), ONE_TILE,
        ),
        Case(
            "ovis2",
            _config("Ovis2Config", vision_config=TOWER | dict(vocab_size=40, hidden_stride=2), hidden_size=WIDTH,
                    text_config=_text("Qwen2Config"), visual_indicator_token_ids=list(MARKS), vocab_size=VOCABULARY,
                    **IMAGE_ID),
            tiles(16, 56, shared=True, between_two=[BREAK]), TILES,
        ),
        Case(
            "kimi_k25",
            _config("Kimi_K25Config", projection_hidden_size=WIDTH, video_token_id=VIDEO,
                    vision_config=dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=4, patch_size=7, pos_emb_height=8, pos_emb_width=8),
                    text_config=_text("DeepseekV3Config", moe_intermediate_size=32, n_routed_experts=4,
                                      num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
                                      n_shared_experts=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                                      qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4),
                    **IMAGE_ID),
            moonvit, video=moonvit_video,
        ),
        Case(
            "molmo2",
            _config("Molmo2Config", image_patch_id=IMAGE, image_start_token_id=START, image_end_token_id=END,
                    low_res_image_start_token_id=START, frame_start_token_id=START, frame_end_token_id=END,
                    vision_config=dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=4, num_key_value_heads=4, head_dim=8, patch_size=7,
                                       image_size=[28, 28]),
                    adapter_config=dict(vision_feature_layer=[1, 0], hidden_size=WIDTH, num_attention_heads=4,
                                        num_key_value_heads=4, head_dim=8, intermediate_size=64,
                                        text_hidden_size=WIDTH),
                    text_config=_text("Molmo2TextConfig", additional_vocab_size=0), tie_word_embeddings=False),
            overlapping_crops, ((3, 4), (2, 3), (2, 2)), types="mm_token_type_ids",
            points={"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"},
            video=crops_of_frames,
        ),
        Case(
            "gemma3n",
            _config("Gemma3nConfig", image_token_id=IMAGE, audio_token_id=11, boi_token_id=START, eoi_token_id=END,
                    vision_soft_tokens_per_image=4, tie_word_embeddings=False,
                    vision_config=dict(architecture="test_convnext", hidden_size=64, vocab_size=8,
                                       vocab_offset=VOCABULARY, do_pooling=False),
                    audio_config=dict(hidden_size=WIDTH, conf_num_hidden_layers=1, vocab_size=8,
                                      vocab_offset=VOCABULARY + 8, conf_num_attention_heads=4),
                    text_config=_text("Gemma3nTextConfig", sliding_window=24, hidden_size_per_layer_input=8,
                                      vocab_size_per_layer_input=VOCABULARY, laurel_rank=4, altup_num_inputs=2,
                                      num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 3,
                                      layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
            tiles(4, 64), ONE_TILE, types="token_type_ids", timm=True,
        ),
        Case(
            "fast_vlm",
            _config("FastVlmConfig", text_config=_text("Qwen2Config"), **OLD_IMAGE_ID,
                    vision_config=dict(model_type="timm_wrapper", architecture="test_convnext", hidden_size=64,
                                       do_pooling=False)),
            tiles(4, 64), ONE_TILE, timm=True,
        ),
        Case(
            "perception_lm",
            _config("PerceptionLMConfig", text_config=_text("LlamaConfig"), video_token_id=VIDEO,
                    projector_pooling_ratio=2, vision_use_cls_token=True, **IMAGE_ID,
                    vision_config=dict(model_type="timm_wrapper", architecture="vit_pe_core_large_patch14_336",
                                       model_args=dict(embed_dim=WIDTH, img_size=[28, 28], patch_size=7, depth=2,
                                                       num_heads=4, mlp_ratio=2, global_pool="", init_values=0.1,
                                                       ref_feat_shape=(2, 2), use_post_transformer_norm=False))),
            thumbnail_and_tiles, ((1, 2), (1, 2), (1, 2)), timm=True,
        ),
        Case(
            "qwen2_vl",
            _config("Qwen2VLConfig", text_config=QWEN_TEXT | dict(rope_parameters=ROPE),
                    vision_config=dict(embed_dim=WIDTH, hidden_size=WIDTH, depth=2, num_heads=4, mlp_ratio=2,
                                       patch_size=7, spatial_merge_size=2, temporal_patch_size=2),
                    **VISION_IDS),
            native(7), types="mm_token_type_ids", video=native_video(7, timestamps=False),
        ),
        Case(
            "qwen2_5_vl",
            _config("Qwen2_5_VLConfig", text_config=QWEN_TEXT | dict(rope_parameters=ROPE),
                    vision_config=dict(hidden_size=WIDTH, intermediate_size=64, out_hidden_size=WIDTH, depth=2,
                                       num_heads=4, patch_size=7, spatial_merge_size=2, temporal_patch_size=2,
                                       window_size=28, fullatt_block_indexes=[1]),
                    **VISION_IDS),
            native(7), types="mm_token_type_ids", video=native_video(7, timestamps=False), core=True,
        ),
        Case(
            "qwen3_vl",
            _config("Qwen3VLConfig", vision_config=QWEN3_TOWER | dict(deepstack_visual_indexes=[0, 1]),
                    text_config=QWEN3_TEXT, **VISION_IDS),
            native(8), types="mm_token_type_ids", video=native_video(8, timestamps=True), core=True,
        ),
        Case(
            "qwen3_vl_moe",
            _config("Qwen3VLMoeConfig", vision_config=QWEN3_TOWER | dict(deepstack_visual_indexes=[0, 1]),
                    text_config=QWEN3_TEXT | EXPERTS, **VISION_IDS),
            native(8), types="mm_token_type_ids", video=native_video(8, timestamps=True),
        ),
        Case(
            "qwen3_5",
            _config("Qwen3_5Config", vision_config=QWEN3_TOWER, text_config=QWEN3_5_TEXT, **VISION_IDS),
            native(8), types="mm_token_type_ids", video=native_video(8, timestamps=True),
        ),
        Case(
            "qwen3_5_moe",
            _config("Qwen3_5MoeConfig", vision_config=QWEN3_TOWER, **VISION_IDS,
                    text_config=QWEN3_5_TEXT | EXPERTS | dict(shared_expert_intermediate_size=32)),
            native(8), types="mm_token_type_ids", video=native_video(8, timestamps=True),
        ),
        Case(
            "paddleocr_vl",
            _config("PaddleOCRVLConfig", text_config=_text("PaddleOCRTextConfig", rope_parameters=ROPE),
                    vision_config=dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=4, image_size=56, patch_size=7),
                    **VISION_IDS),
            native_unfolded(7), types="mm_token_type_ids",
        ),
        Case(
            "glm4v", _config("Glm4vConfig", **GLM), native(7), types="mm_token_type_ids",
            video=native_video(7, timestamps=True, as_images=True),
        ),
        Case(
            "glm46v",
            _config("Glm46VConfig", **GLM | dict(vision_config=GLM["vision_config"] | dict(model_type="glm4v_vision"),
                                                 text_config=GLM["text_config"] | dict(model_type="glm4v_text"))),
            native(7), types="mm_token_type_ids", video=native_video(7, timestamps=True, as_images=True),
        ),
    )
}  # fmt: skip
