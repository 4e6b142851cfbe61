"""The stock `LlavaForConditionalGeneration` of tower, projector and language model, and its processor."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .language import END, IMAGE
from .placing import GRID, PATCH, SIDE
from .projector import Projector
from .tower import FEATURE_LAYER


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@torch.no_grad()
def stock_llava(
    clip: CLIPVisionModel, projector: Projector, language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """The parts put together, in float32; the token of the image's place is new to the language model."""
    image, end = tokenizer.convert_tokens_to_ids([IMAGE, END])
    text = language.config.to_dict()
    text.pop("quantization_config", None)  # the weights are no longer quantised
    text |= {"vocab_size": image + 1, "eos_token_id": end, "pad_token_id": end, "dtype": "float32"}
    config = LlavaConfig(
        vision_config=clip.config.to_dict(),
        text_config=text,
        image_token_index=image,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=GRID**2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    table = language.get_input_embeddings().weight.float()[:image]
    weights = {f"language_model.{name}": value for name, value in language.model.state_dict().items()}
    weights["language_model.embed_tokens.weight"] = torch.cat([table, table.mean(0, keepdim=True)])
    weights |= {f"vision_tower.{name}": value for name, value in clip.state_dict().items()}
    weights |= {f"multi_modal_projector.{name}": value for name, value in projector.state_dict().items()}
    model.model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=text["bos_token_id"], eos_token_id=end, pad_token_id=end)
    return model.eval()


def stock_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    images = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
