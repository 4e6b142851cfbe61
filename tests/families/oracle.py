"""The method written out on the STOCK model: naive scores, loops, one full pass a token, no cache, none of our code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .tiny import BREAK, EOS, IMAGE, PAD, SPECIAL, Case, Picture, Prompt


@dataclass(frozen=True)
class State:
    """A compact prompt of one row.

    Args:
        embeds (`torch.Tensor` of shape `(1, n, d)`).
        ids (`torch.LongTensor` of shape `(1, n)`).
        types (`torch.LongTensor` of shape `(1, n)`): 0 text, 1 image, 2 video.
        told (`torch.LongTensor` of shape `(1, n)`): what stock is told of it.
        places (`list[int]`): positions in the unpruned prompt.
        positions (`torch.LongTensor` of shape `(3, 1, n)` or `(1, n)`, *optional*): m-RoPE, or places with gaps.
        deepstack (`list[torch.Tensor]`): per layer `(visual tokens, d)`.
    """

    embeds: torch.Tensor
    ids: torch.Tensor
    types: torch.Tensor
    told: torch.Tensor
    places: list[int]
    positions: torch.Tensor | None
    deepstack: list[torch.Tensor]


class Oracle:
    """Args: the case, its stock model, and prototypes `(m, d)`."""

    def __init__(self, case: Case, stock: Any, prototypes: torch.Tensor):
        self.case, self.stock, self.prototypes = case, stock, prototypes

    def keep(self, picture: Picture, tokens: torch.Tensor, ratio: float) -> list[bool]:
        """Which visual tokens of a picture stay: those least like any prototype, in each part; and all row ends."""
        scored = [i for i in range(len(tokens)) if i not in picture.ends]
        stay = set(picture.ends)
        for count in picture.parts:
            part, scored = scored[:count], scored[count:]
            scores = {
                i: max(float(torch.cosine_similarity(tokens[i], p, dim=0)) for p in self.prototypes) for i in part
            }
            stay |= set(sorted(part, key=lambda i: (scores[i], i))[: max(1, round(ratio * count))])
        assert not scored, "a picture's parts do not cover it"
        return [i in stay for i in range(len(tokens))]

    @torch.no_grad()
    def features(self, prompt: Prompt) -> dict[str, dict[str, Any]]:
        """Stock features by modality: `tokens` `(n, d)`, `deepstack` per layer `(n, d)`, and the output itself."""
        tensors = self.case.visual([prompt])
        modalities = {item.modality for item in prompt if isinstance(item, Picture)}
        features = {}
        for modality in modalities:
            own = {name: value for name, value in tensors.items() if name in _names(modality)}
            output = getattr(self.stock.model, f"get_{modality}_features")(**own, return_dict=True)
            flat = torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in output.pooler_output])
            layers = [torch.cat(list(layer)) for layer in output.get("deepstack_features") or []]
            features[modality] = {"tokens": flat, "deepstack": layers, "output": output}
        return features

    @torch.no_grad()
    def prepare(
        self,
        prompt: Prompt,
        ratio: float,
        first_turn: int | None = None,
        newlines: str = "all",
        keep_positions: bool = False,
    ) -> State:
        """The compact prompt. What stands behind the `first_turn` positions was said later."""
        inputs = self.case.inputs([prompt])
        ids = inputs["input_ids"][0]
        features = self.features(prompt)
        embeds, types, places, layers, used, place = [], [], [], [], {"image": 0, "video": 0}, 0
        for item in prompt:
            if not isinstance(item, Picture):
                embeds += list(self.stock.get_input_embeddings()(torch.tensor(item)))
                places += range(place, place + len(item))
                types += [0] * len(item)
                place += len(item)
                continue
            seen = used[item.modality]
            tokens = features[item.modality]["tokens"][seen : seen + len(item)]
            mask, number = self.keep(item, tokens, ratio), 0
            stays_in_row = False
            for column, token in enumerate(item.ids):
                ends_row = token == BREAK and IMAGE == item.ids[column - 1] == item.ids[column + 1]
                if ends_row and (newlines == "last" or (newlines == "row" and not stays_in_row)):
                    stays_in_row = False
                elif token != item.placeholder:
                    stays_in_row = False
                    embeds.append(self._mark(token, features[item.modality]["output"]))
                    types.append(0)
                    places.append(place)
                else:
                    if mask[number]:
                        stays_in_row = True
                        embeds.append(self._visual(tokens[number], token))
                        types.append(1 if item.modality == "image" else 2)
                        places.append(place)
                        layers.append([layer[seen + number] for layer in features[item.modality]["deepstack"]])
                    number += 1
                place += 1
            used[item.modality] += len(item)
        positions = torch.tensor([places]) if keep_positions else None
        if hasattr(self.stock.model, "get_rope_index"):
            grids = {name: value for name, value in inputs.items() if name.endswith("grid_thw")}
            known = {"mm_token_type_ids": inputs["mm_token_type_ids"], "attention_mask": inputs["attention_mask"]}
            positions = self.stock.model.get_rope_index(inputs["input_ids"], **known, **grids)[0][:, :, places]
        if self.case.prefix:
            told = [int(first_turn is not None and place >= first_turn) for place in places]
        else:
            told = inputs[self.case.types][0, places].tolist() if self.case.types else types
        return State(
            torch.stack(embeds)[None], ids[places][None], torch.tensor([types]),
            torch.tensor([told]), places, positions,
            [torch.stack(layer) for layer in zip(*layers)],
        )  # fmt: skip

    def _visual(self, feature: torch.Tensor, token: int) -> torch.Tensor:
        """A visual token stands in place of its placeholder; Molmo 2 adds it to the placeholder's embedding."""
        if self.case.model_type != "molmo2":
            return feature
        return feature + self.stock.get_input_embeddings()(torch.tensor(token))

    def _mark(self, token: int, output: Any) -> torch.Tensor:
        """A mark beside placeholders: text, but Ovis2 embeds it on the vision side."""
        indicators = getattr(self.stock.model, "visual_indicator_token_ids", None)
        if indicators is not None and token in indicators:
            return output.visual_indicator_features[list(indicators).index(token)]
        return self.stock.get_input_embeddings()(torch.tensor(token))

    def logits(self, state: State) -> torch.Tensor:
        """`(n, vocabulary)` of a full pass."""
        arguments: dict[str, Any] = {} if state.positions is None else {"position_ids": state.positions}
        if state.positions is not None and state.positions.ndim == 2:  # one sequence, not packed ones
            arguments["attention_mask"] = torch.ones_like(state.ids)
        if state.deepstack:
            hidden = self.stock.get_decoder()(
                inputs_embeds=state.embeds, visual_pos_masks=state.types > 0, deepstack_visual_embeds=state.deepstack,
                use_cache=False, **arguments,
            ).last_hidden_state  # fmt: skip
            return self.stock.lm_head(hidden)[0]
        if self.case.model_type == "gemma3n":  # older stock classes take no per-layer inputs beside embeddings
            decoder, cap = self.stock.get_decoder(), self.stock.config.get_text_config().final_logit_softcapping
            hidden = decoder(
                inputs_embeds=state.embeds,
                per_layer_inputs=decoder.get_per_layer_inputs(state.ids),
                use_cache=False,
                **arguments,
            ).last_hidden_state
            return (cap * torch.tanh(self.stock.lm_head(hidden) / cap))[0]
        if self.case.types:
            arguments[self.case.types] = state.told
        if hasattr(self.stock.get_decoder(), "get_per_layer_inputs"):
            ids = state.ids.masked_fill(state.types > 0, PAD)
            arguments["per_layer_inputs"] = self.stock.get_decoder().get_per_layer_inputs(ids, None)
        return self.stock(inputs_embeds=state.embeds, use_cache=False, **arguments).logits[0]

    @torch.no_grad()
    def add(self, state: State, words: list[int]) -> State:
        """Text after what is there."""
        ids = torch.tensor([words])
        first = state.places[-1] + 1
        positions = state.positions
        if positions is not None:
            after = positions[..., -1].max() + 1 + torch.arange(len(words))
            positions = torch.cat([positions, after.expand(*positions.shape[:-1], -1)], -1)
        return replace(
            state,
            embeds=torch.cat([state.embeds, self.stock.get_input_embeddings()(ids)], 1),
            ids=torch.cat([state.ids, ids], 1),
            types=torch.cat([state.types, torch.zeros_like(ids)], 1),
            told=torch.cat([state.told, torch.full_like(ids, int(self.case.prefix))], 1),
            places=[*state.places, *range(first, first + len(words))],
            positions=positions,
        )

    @torch.no_grad()
    def greedy(self, state: State, steps: int = 6) -> tuple[list[int], torch.Tensor]:
        """An answer, up to and with the end mark, and the logits `(n, vocabulary)` behind it."""
        tokens: list[int] = []
        logits = []
        while len(tokens) < steps and EOS not in tokens:
            logits.append(self.logits(state)[-1])
            scores = logits[-1].clone()
            scores[SPECIAL] = -torch.inf
            tokens.append(int(scores.argmax()))
            state = self.add(state, tokens[-1:])
        return tokens, torch.stack(logits)


def _names(modality: str) -> tuple[str, ...]:
    if modality == "video":
        return (
            "pixel_values_videos",
            "video_grid_thw",
            "video_position_ids",
            "num_frames_per_video",
            "video_token_pooling",
            "video_grids",
        )
    return (
        "pixel_values",
        "image_grid_thw",
        "image_sizes",
        "pixel_attention_mask",
        "spatial_shapes",
        "image_position_ids",
        "image_token_pooling",
        "image_grids",
    )
