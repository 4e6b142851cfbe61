"""Contract 12: what transformers may rename, pruning refuses instead of answering wrongly."""

import functools
import inspect
import traceback

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING

import transformers_rbl
from conftest import GREEDY, visual
from transformers_rbl import PruningConfig
from transformers_rbl.models import seam
from transformers_rbl.models.auto_rbl import family_class
from transformers_rbl.models.generation_rbl import RBLGenerationMixin
from transformers_rbl.models.modeling_any_rbl import make_classes
from transformers_rbl.models.seam import CACHE, CACHE_NAMES, Call, check_stock


def with_argument(stock, method, old, new):
    """A stock class as a later transformers may have it: an argument of a method under another name, or one more."""

    class Renamed(stock):
        pass

    original = getattr(stock, method)
    signature = inspect.signature(original)
    parameters = [p.replace(name=new) if p.name == old else p for p in signature.parameters.values()]
    if old is None:
        parameters.insert(-1, inspect.Parameter(new, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None))

    @functools.wraps(original)
    def renamed(*args, **kwargs):
        return original(*args, **kwargs)

    renamed.__signature__ = signature.replace(parameters=parameters)
    setattr(Renamed, method, renamed)
    Renamed.__name__ = stock.__name__
    return Renamed


ARGUMENTS = [
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    CACHE,
    "mm_encoder_outputs",
    "pixel_values",
]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_renamed_argument_of_a_stock_class_is_refused_when_the_class_is_made(family, name):
    for stock, mixin in ((family.stock_class, RBLGenerationMixin), (family.stock_headless, family.headless_class)):
        renamed = with_argument(stock, "forward", name, f"new_{name}")
        with pytest.raises(TypeError, match=rf"{stock.__name__}\.forward .*{transformers.__version__}.*new_{name}"):
            type("Pruned", (mixin,), {"family": family.headless_class.family}, stock=renamed)


def test_an_argument_that_is_gone_is_refused(family):
    class Without(family.stock_class):
        def forward(
            self, input_ids=None, pixel_values=None, inputs_embeds=None, position_ids=None, cache=None, **kwargs
        ):
            return super().forward(input_ids=input_ids, **kwargs)

    with pytest.raises(TypeError, match="takes no attention_mask, mm_encoder_outputs"):
        check_stock(Without)


@pytest.mark.parametrize("method", ["forward", "get_image_features"])
def test_an_argument_of_unknown_role_is_refused(family, method):
    stock = with_argument(family.stock_headless, method, None, "token_depths")
    with pytest.raises(TypeError, match=f"{method} .* takes token_depths.*does not know whether that runs along"):
        check_stock(stock)


def test_a_family_that_changed_leaves_the_others_and_says_why(monkeypatch):
    """Classes are made when they are asked for, so that one that transformers changed does not spoil the others."""
    changed = with_argument(transformers.Qwen2VLModel, "forward", None, "depths")
    monkeypatch.setitem(MODEL_MAPPING._extra_content, transformers.Qwen2VLConfig, changed)
    transformers_rbl.register()
    make_classes.cache_clear()
    with pytest.raises(TypeError, match="Qwen2VLModel.forward .* takes depths"):
        family_class("qwen2_vl")
    assert family_class("qwen3_vl").stock is transformers.Qwen3VLForConditionalGeneration


def test_a_renamed_function_of_positions_is_refused():
    """Without it every m-RoPE family would fall back to 1-D positions, without a word."""

    class New(transformers.LlavaModel):
        def get_rope_index(self, input_ids, mm_token_type_ids):
            raise AssertionError("never called")

    check_stock(transformers.Qwen2VLModel, mrope=True)
    for stock, mrope, has in (
        (transformers.LlavaModel, True, "no"),
        (New, False, "a"),
        (transformers.Qwen2VLModel, False, "a"),
    ):
        with pytest.raises(TypeError, match=f"has {has} get_rope_index"):
            check_stock(stock, mrope)
    untyped = with_argument(transformers.Qwen2VLModel, "forward", "mm_token_type_ids", "labels")
    with pytest.raises(TypeError, match="takes no mm_token_type_ids"):
        check_stock(untyped, mrope=True)


@pytest.mark.parametrize(
    "features", [{"images": None}, {"image": (torch.zeros(1),)}, {"image": torch.zeros(1, 4)}], ids=str
)
def test_features_of_another_form_get_a_sentence(pruned, one, features):
    given = {
        key: value if value is not None else pruned.get_image_features(**visual(one)) for key, value in features.items()
    }
    with pytest.raises(ValueError, match="it takes what get_image_features"):
        pruned(input_ids=one.input_ids, mm_encoder_outputs=given)


def test_a_prompt_given_twice_is_refused(pruned, one):
    with pytest.raises(ValueError, match="given twice, as inputs and input_ids"):
        pruned.generate(one.input_ids, **one)


def test_features_with_an_unknown_part_are_refused(family, one):
    model = family.pruned()

    class Deep(type(model.family)):
        def encode(self, *args):
            output = super().encode(*args)
            output["token_depths"] = output.pooler_output
            return output

    model.model.family = Deep(family.name)
    with pytest.raises(ValueError, match="come with token_depths"):
        model(**one)


def test_a_newer_transformers_is_named_once_with_the_command_that_checks_it(monkeypatch, caplog):
    transformers.utils.logging.enable_propagation()
    seam.warn_if_untested()
    assert "rbl verify" not in caplog.text
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    seam.warn_if_untested()
    seam.warn_if_untested()
    transformers.utils.logging.disable_propagation()
    assert caplog.text.count("rbl verify") == 1 and "5.99.0" in caplog.text


def test_an_unknown_tensor_of_the_prompts_length_is_refused(pruned, one):
    with pytest.raises(ValueError, match="token_depths is a tensor of the prompt's length"):
        pruned(**one, token_depths=torch.zeros_like(one.input_ids))
    pruned(**one, num_items_in_batch=torch.tensor(one.input_ids.shape[1]))  # a number, not along the prompt
    pruned(**one, pruning=PruningConfig(keep_ratio=1.0), token_depths=None)
    with pytest.raises(ValueError, match="cache_position describes the unpruned prompt"):
        pruned(**one, cache_position=torch.arange(one.input_ids.shape[1]))


def test_forward_and_generate_are_our_code_with_stock_signatures(family):
    for ours, stock in ((family.rbl_class, family.stock_class), (family.headless_class, family.stock_headless)):
        for name in ("forward", "generate", "get_image_features", "get_video_features"):
            if not hasattr(stock, name):
                assert not hasattr(ours, name)
                continue
            method, original = getattr(ours, name), inspect.signature(getattr(stock, name))
            assert "pruning" in inspect.getsource(method).splitlines()[0]
            assert "transformers_rbl" in inspect.getsourcefile(method)
            parameters = dict(inspect.signature(method).parameters)
            assert parameters.pop("pruning").kind is inspect.Parameter.KEYWORD_ONLY
            assert parameters == dict(original.parameters)
            assert "pruning" in method.__doc__


def test_a_traceback_names_our_code(pruned, one):
    with pytest.raises(ValueError) as error:
        pruned.generate(**{**one, "input_ids": one.input_ids[:, :-20]}, **GREEDY)
    names = [(frame.name, frame.filename.rpartition("/")[2]) for frame in traceback.extract_tb(error.tb)]
    assert ("generate", "generation_rbl.py") in names and ("prepare", "modeling_rbl.py") in names


def test_pixels_reach_the_score_in_a_few_calls(family, one):
    model, path = family.pruned(), []
    compared = model.codebook.unit_prototypes_for

    def traced(*args, **kwargs):
        frames = inspect.stack()
        path.extend(f.function for f in frames if "transformers_rbl" in f.filename and "<" not in f.function)
        return compared(*args, **kwargs)

    model.codebook.unit_prototypes_for = traced
    model.generate(**one, **GREEDY)
    calls = path[: path.index("generate") + 1]
    assert len(calls) <= 8 and calls[0] == "choose", calls


def test_every_name_of_the_cache_is_one_thing():
    for name in CACHE_NAMES:
        call = Call.read({name: "the cache", "use_cache": True})
        assert call.cache == "the cache" and call.arguments() == {CACHE: "the cache", "use_cache": True}
    with pytest.raises(ValueError, match=r"KV cache was given twice, as cache and past_key_values"):
        Call.read({"cache": 1, "past_key_values": 2})


def test_a_call_keeps_what_it_was_given(one):
    given = {**one, "labels": one.input_ids, "use_cache": True, "logits_to_keep": 1, "mm_encoder_outputs": None}
    again = Call.read(given).arguments()
    assert again == {name: value for name, value in given.items() if value is not None}


def test_surplus_and_repeated_arguments_raise_as_in_stock(family, pruned, one):
    with pytest.raises(TypeError):
        pruned(one.input_ids, input_ids=one.input_ids)
    with pytest.raises(TypeError):
        pruned(*range(40))
    positional = pruned(
        one.input_ids, one.pixel_values, **{k: v for k, v in visual(one).items() if k != "pixel_values"}
    )
    assert torch.equal(positional.logits, pruned(**one).logits)
