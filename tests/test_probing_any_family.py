"""Probing families that came after LLaVA: every quantity against whole prompts of the stock model, without a cache."""

import csv
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

import small_families
from small_families import IMAGE
from test_probing import divergence
from transformers_rbl import RedundancyCodebook, demo
from transformers_rbl.building.images import ImageSource
from transformers_rbl.building.inspection import contact_sheet
from transformers_rbl.building.probing import Prober
from transformers_rbl.building.provenance import read_provenance
from transformers_rbl.building.recipe import Recipe
from transformers_rbl.building.showing import is_supported, show, why_not
from transformers_rbl.cli import app
from transformers_rbl.evaluation.evaluate import prompt_text


SHARING = ("qwen2_5_vl", "qwen3_vl", "internvl", "mistral3")
# A window of 24 tokens, image tokens that see what follows them, and states in place of keys and values.
RECOMPUTING = ("gemma3", "gemma3-wide", "qwen3_5")
PAD = 9  # a byte's token: the word embedding of padding itself is zero in some families
SLOW = pytest.mark.slow


class Literal:
    """The stock model on a list of the prompt's columns: one whole prompt, one pass, no cache."""

    def __init__(self, family, recipe, articles=frozenset()):
        self.model, self.recipe, self.articles = family.stock(), recipe, articles
        self.processor = family.processor
        # One piece: no tiles.
        whole = {"crop_to_patches": False} if family.name == "internvl" else {}
        self.make = lambda image: family.processor(
            images=[[image]], text=[prompt_text(family.processor, recipe.prompt, 1)], return_tensors="pt", **whole
        )

    @torch.no_grad()
    def see(self, image):
        inputs = self.make(image)
        self.ids = inputs["input_ids"][0].tolist()
        visual = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "image_sizes") if name in inputs}
        self.encoded = self.model.get_image_features(**visual, return_dict=True)
        self.tokens = torch.cat(list(self.encoded.pooler_output))
        self.views = [torch.cat(list(view)) for view in self.encoded.get("deepstack_features") or ()]
        self.places = [column for column, token in enumerate(self.ids) if token == IMAGE]
        self.types = next((inputs[name][0] for name in ("token_type_ids", "mm_token_type_ids") if name in inputs), None)
        self.name_of_types = next((n for n in ("token_type_ids", "mm_token_type_ids") if n in inputs), None)
        self.positions = None
        if hasattr(self.model.model, "get_rope_index"):
            self.positions = self.model.model.get_rope_index(
                inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
                image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"],
            )[0][:, 0]  # fmt: skip

    @torch.no_grad()
    def answer(self, visible, gone=(), whole=False):
        """Logits of the first answer token, with some visual tokens in the prompt and some of these left out."""
        before, after = self.places[0], self.places[-1] + 1
        columns = [c for c in range(len(self.ids)) if c < before or c >= after or (whole and c not in self.places)]
        columns = sorted(columns + [self.places[token] for token in visible])
        kind = self.recipe.replacement
        if kind == "remove":
            columns = [c for c in columns if c not in [self.places[token] for token in gone]]
        ids, rows, layers = [], [], [[] for _ in self.views]
        for column in columns:
            token = self.places.index(column) if column in self.places else None
            if token in gone and token is not None and kind == "pad":
                ids.append(PAD)  # a word, which takes no feature and no deepstack row
                continue
            ids.append(self.ids[column])
            if token is not None:
                mean = token in gone
                rows.append(self.tokens.mean(0) if mean else self.tokens[token])
                for layer, view in zip(layers, self.views):
                    layer.append(view.mean(0) if mean else view[token])
        return self._run(ids, columns, rows, layers)

    def _run(self, ids, columns, rows, layers):
        parts = {"input_ids": torch.tensor([ids])}
        if rows:
            stacked = self.encoded.pooler_output
            rows = torch.stack(rows)
            features = {"pooler_output": rows[None] if isinstance(stacked, torch.Tensor) else [rows]}
            if layers:
                features["deepstack_features"] = [[torch.stack(layer)] for layer in layers]
            parts["mm_encoder_outputs"] = {"image": type(self.encoded)(**features)}
        if self.positions is not None:
            parts["position_ids"] = self.positions[:, columns][:, None]
        if self.types is not None:
            parts[self.name_of_types] = self.types[columns][None]
        logits = self.model(**parts, use_cache=False).logits[0, -1]
        if int(logits.argmax()) in self.articles:
            parts["input_ids"] = torch.cat([parts["input_ids"], logits.argmax()[None, None]], dim=1)
            if self.positions is not None:
                last = parts["position_ids"]
                parts["position_ids"] = torch.cat([last, (last.max() + 1).expand(3, 1, 1)], dim=-1)
            if self.types is not None:
                types = parts[self.name_of_types]
                parts[self.name_of_types] = torch.cat([types, types.new_zeros(1, 1)], dim=1)
            logits = self.model(**parts, use_cache=False).logits[0, -1]
        return logits.double().tolist()


@pytest.fixture(scope="module")
def family_named(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            family, _, wide = name.partition("-")
            text = {"sliding_window": 4096} if wide else {}
            made[name] = small_families.family(tmp_path_factory.mktemp(name), family, **text)
        return made[name]

    return get


def around(position, rows, columns):
    row, column = divmod(position, columns)
    top, left = min(max(row - 1, 0), max(rows - 3, 0)), min(max(column - 1, 0), max(columns - 3, 0))
    return [r * columns + c for r in range(top, min(top + 3, rows)) for c in range(left, min(left + 3, columns))]


CASES = [("qwen3_vl", "pad", 8192), ("qwen3_vl", "mean", 1), ("internvl", "pad", 200), ("gemma3-wide", "mean", 200)]
MORE = [(n, r, b) for n in SHARING + RECOMPUTING for r in ("pad", "mean", "remove") for b in (8192, 1)]
CASES += [pytest.param(*case, marks=SLOW) for case in MORE if case not in CASES]


@pytest.mark.parametrize(("name", "replacement", "budget"), CASES)
def test_every_quantity_equals_the_transcription(family_named, name, replacement, budget):
    """Targets at borders and corners of a grid that need not be square."""
    family = family_named(name)
    targets = {"by": "stride", "stride": 5}
    recipe = Recipe(prompt="Name it.", targets=targets, replacement=replacement, pad_token_id=PAD)
    literal = Literal(family, recipe)
    photo = small_families.photos(1)[0]
    literal.see(photo)
    answered = literal.answer([5])
    literal.articles = {answered.index(max(answered))}  # as if the likeliest answer to one token were an article
    prober = Prober(family.stock(), recipe, literal.articles, budget)
    with torch.no_grad():
        shown = show(prober.model, family.processor, recipe.prompt, photo)
    probe = prober.probe("photo", shown)
    count, (rows, columns) = len(literal.places), shown.grid
    assert rows * columns == count == len(shown.tokens) and probe.positions.tolist() == list(range(0, count, 5))
    assert (rows != columns) is (family.name not in ("internvl", "gemma3"))
    torch.testing.assert_close(probe.tokens, literal.tokens[::5], atol=1e-5, rtol=1e-5)
    everything = range(count)
    unchanged = literal.answer(everything, whole=True)
    for row, position in enumerate(probe.positions.tolist()):
        alone, near = literal.answer([position]), around(position, rows, columns)
        best = sorted(alone, reverse=True)[: recipe.top_k_p1]
        assert float(probe.p1[row]) == pytest.approx(1 / sum(math.exp(v - best[0]) for v in best), abs=2e-5)
        assert probe.words[row] == [str(w) for w in sorted(range(len(alone)), key=lambda i: -alone[i])[:3]]
        pairs = {
            "local": (literal.answer(near), literal.answer(near, {position})),
            "globally": (unchanged, literal.answer(everything, set(near), whole=True)),
        }
        for which, pair in pairs.items():
            for kind, measured in getattr(probe, which).items():
                expected = divergence(*pair, kind)
                assert float(measured[row]) == pytest.approx(expected, abs=2e-6, rel=1e-3), (which, kind, row)


@pytest.mark.parametrize(
    "name", [*SHARING[1:3], RECOMPUTING[0], *(pytest.param(n, marks=SLOW) for n in RECOMPUTING[1:])]
)
def test_a_shared_beginning_is_computed_once_where_the_cache_can_be_cut(family_named, name):
    """Elsewhere every prompt is computed whole, and nothing is kept."""
    family = family_named(name)
    prober = Prober(family.stock(), Recipe(prompt="Name it.", targets={"by": "all"}, skip_articles=0), (), 1)
    with torch.no_grad():
        shown = show(prober.model, family.processor, "Name it.", small_families.photos(1)[0])
    lengths = []

    def count(module, args, kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])

    hook = prober.model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    prober.probe("photo", shown)
    hook.remove()
    places = shown.slots.nonzero()[:, 0].tolist()
    before, after, n = places[0], len(shown.ids) - places[-1] - 1, len(places)
    rows, columns = shown.grid
    firsts = [min(around(position, rows, columns)) for position in range(n)]
    if name in SHARING:
        expected = [before, *[1 + after] * n, *[9 + after] * 2 * n, n, after]
        expected += sorted((n - first + after for first in firsts), reverse=True)
    else:
        expected = [before + 1 + after] * n + [before + 9 + after] * 2 * n + [len(shown.ids)] * (1 + n)
    assert lengths == expected


def build(family, photos, out, *words):
    recipe = {"targets": "{by: stride, stride: 2}", "thresholds": "quantile", "max_p1": 0.9, "max_divergence": 0.9}
    recipe |= {"min_unique_images": 0, "max_cluster_size": "null", "num_images": 4, "prompt": "Name it."}
    settings = [word for name, value in recipe.items() for word in ("--set", f"{name}={value}")]
    arguments = ["--model", family.folder, "--images", photos, "--recipe", "digits", *settings, "--out", out, *words]
    return CliRunner().invoke(app, ["build", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, photo in enumerate(small_families.photos(4)):
        photo.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def built(family_named, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "book"
    result = build(family_named("qwen3_vl"), photos, out)
    assert result.exit_code == 0, result.output
    return out


def test_a_built_codebook_knows_where_its_prototypes_lie(family_named, photos, built, tmp_path):
    """Photos of several shapes: rows and columns are the image's own, for the contact sheet and for the demo."""
    family = family_named("qwen3_vl")
    provenance = read_provenance((built / "provenance.csv").read_text())
    shapes = {row["image"]: (int(row["rows"]), int(row["columns"])) for row in provenance}
    with torch.no_grad():
        for name, shape in shapes.items():
            photo = demo.open_photo(photos / name)
            shown = show(family.stock(), family.processor, "Name it.", photo)
            assert shown.grid == shape and all(
                int(row["position"]) < len(shown.tokens) for row in provenance if row["image"] == name
            )
    assert len(set(shapes.values())) > 1
    book = RedundancyCodebook.from_pretrained(built)
    assert book.built_with["model"]["type"] == "qwen3_vl" and "grid" not in book.built_with["model"]
    drawn, missing = contact_sheet(book, provenance, ImageSource(photos), tmp_path / "sheet.png")
    assert drawn == min(96, len(provenance)) and missing == 0
    stand = demo.load_demo(family.folder, built, photos, device="cpu")
    answer = demo.ask(stand, demo.open_photo(photos / "0.png"), "what?", repeats=1, max_new_tokens=1)
    click = demo.explain_click(stand, answer, "base", 1, 1)
    assert click.sources and answer.explanations[0][0].grid in shapes.values()


def test_the_same_bytes_whatever_the_budget(family_named, photos, built, tmp_path):
    """A killed build goes on; batches of another size come to the same codebook."""
    result = build(family_named("qwen3_vl"), photos, tmp_path / "small", "--max-tokens-per-batch", 100)
    assert result.exit_code == 0, result.output
    for name in ("codebook.safetensors", "codebook.json"):
        assert (tmp_path / "small" / name).read_bytes() == (built / name).read_bytes(), name
    tables = [list(csv.reader((folder / "provenance.csv").open())) for folder in (tmp_path / "small", built)]
    assert [row[:3] + row[7:] for row in tables[0]] == [row[:3] + row[7:] for row in tables[1]]


@pytest.mark.slow
def test_the_same_bytes_over_processes(family_named, photos, built, tmp_path):
    import os
    import subprocess
    import sys

    recipe = built / "recipe.yaml"
    words = [
        "--model",
        family_named("qwen3_vl").folder,
        "--images",
        photos,
        "--recipe",
        recipe,
        "--out",
        tmp_path / "two",
    ]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "transformers_rbl.cli", "build"]
    result = subprocess.run(
        [*launch, *map(str, words)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    for name in ("codebook.safetensors", "codebook.json", "provenance.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (built / name).read_bytes(), name


def test_what_cannot_be_probed_is_refused_before_the_build(family_named, photos, tmp_path):
    qwen = family_named("qwen3_vl").stock()
    assert why_not(qwen) is None and is_supported(qwen)
    ranked = Recipe(targets={"by": "cls_rank", "ranks": [[1, 4]]})
    assert "this tower has none" in why_not(qwen, ranked)
    assert "load the full qwen3_vl model" in why_not(qwen.model)
    result = build(
        family_named("qwen3_vl"), photos, tmp_path / "no", "--set", "targets={by: cls_rank, ranks: [[1, 4]]}"
    )
    assert (
        result.exit_code == 2 and "this tower has none" in result.output and not (tmp_path / "no" / "records").exists()
    )
    config = AutoConfig.for_model("llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    text = torch.nn.Module()
    text.config = config
    assert "this is a llama model" in why_not(text)
    with pytest.raises(ValueError, match="this is a llama model"):
        Prober(text, Recipe())


def test_an_image_whose_grid_is_not_known_is_refused(family_named, monkeypatch):
    internvl = family_named("internvl")
    model = AutoModelForImageTextToText.from_pretrained(internvl.folder).eval()
    monkeypatch.setattr("transformers_rbl.building.showing.TILING", ())
    with (
        pytest.raises(ValueError, match="How the 48 tokens of a internvl image lie in it is not known"),
        torch.no_grad(),
    ):
        show(model, internvl.processor, "Name it.", small_families.photos(1)[0])
