"""Upstream's files and upstream's arithmetic: `rbl convert`, and each mode of the method's table as a loop."""

import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from transformers_rbl import PruningConfig, RedundancyCodebook, kept_token_count
from transformers_rbl.building.upstream import convert_upstream
from transformers_rbl.cli import app


DATA = Path(os.environ.get("UPSTREAM_CODEBOOKS", Path(__file__).parents[2] / "shared/data/upstream-codebooks"))
REAL = {
    "llava-1.5-7b": ((454, 4096), 25, "1373a7b98452"),
    "llava-onevision-qwen2-7b-ov": ((45, 3584), 0, "e961a9069d0d"),
}


def generated(folder):
    """A file of the same kind, with two repeated rows."""
    prototypes = torch.randn(20, 64, generator=torch.Generator().manual_seed(5)).half()
    prototypes[[7, 12]] = prototypes[[3, 3]]
    torch.save(prototypes, folder / "generated.pt")
    (folder / "generated.image_ids.json").write_text(json.dumps([str(i // 2) for i in range(20)]))
    return folder / "generated.pt", folder / "generated.image_ids.json"


@pytest.fixture(scope="module", params=["generated", *REAL])
def source(request, tmp_path_factory):
    if request.param == "generated":
        return generated(tmp_path_factory.mktemp("upstream"))
    if not (DATA / f"{request.param}.pt").exists():
        pytest.skip(f"upstream's codebooks are not in {DATA} (set UPSTREAM_CODEBOOKS)")
    return DATA / f"{request.param}.pt", DATA / f"{request.param}.image_ids.json"


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_a_file_converts_bit_for_bit_with_its_provenance(source, tmp_path):
    file, ids = source
    result = run(file, tmp_path / "book", "--image-ids", ids, "--base-model", "org/base", "--threshold", "0.45")
    assert result.exit_code == 0, result.output
    book = RedundancyCodebook.from_pretrained(tmp_path / "book")
    original = torch.load(file, map_location="cpu", weights_only=True)
    assert torch.equal(book.prototypes, original.detach().float()) and book.base_model == "org/base"
    assert book.recommended_pruning == PruningConfig(threshold=0.45)
    origin = book.built_with["source"]
    shape, repeated, sha = REAL.get(file.stem, ((20, 64), 2, ""))
    assert tuple(book.prototypes.shape) == shape and origin["sha256"].startswith(sha)
    assert origin["repeated_rows"] == repeated and f"{repeated}, kept" in result.output
    assert origin["dtype"] == "float16" and origin["image_ids"] == json.loads(ids.read_text())


def test_repeated_rows_may_go(source, tmp_path):
    file, ids = source
    assert run(file, tmp_path, "--drop-duplicates", "--image-ids", ids).exit_code == 0
    book, full = RedundancyCodebook.from_pretrained(tmp_path), convert_upstream(file)
    assert len(book.prototypes) == len(full.prototypes) - full.built_with["source"]["repeated_rows"]
    assert len(book.built_with["source"]["image_ids"]) == len(book.prototypes)
    tokens = torch.randn(30, book.prototypes.shape[1])
    torch.testing.assert_close(book.score(tokens), full.score(tokens), atol=1e-6, rtol=0)


class Surprise:
    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"prototypes": torch.ones(3, 4)}, "got dict"),
        (torch.ones(3), "got (3,)"),
        (torch.ones(3, 4, dtype=torch.int64), "floating point"),
        (torch.full((3, 4), math.inf), "NaN or infinite"),
        (torch.zeros(3, 4), "zero"),
        (Surprise(), "never unpickled"),
    ],
)
def test_anything_else_gets_one_sentence(tmp_path, content, words):
    torch.save(content, tmp_path / "bad.pt")
    result = run(tmp_path / "bad.pt", tmp_path / "out")
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert "a pickle ran code" not in result.output and not (tmp_path / "out").exists()


def test_a_file_saved_on_a_gpu_is_read_without_one(tmp_path):
    file, _ = generated(tmp_path)
    moved = tmp_path / "gpu.pt"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(moved, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(name, content)
    assert torch.equal(convert_upstream(moved).prototypes, convert_upstream(file).prototypes)


def test_broken_files_and_ids(tmp_path):
    file, ids = generated(tmp_path)
    short = tmp_path / "short.pt"
    short.write_bytes(file.read_bytes()[:-300])
    assert "never unpickled" in run(short, tmp_path / "out").stderr
    assert "missing.pt" in run(tmp_path / "missing.pt", tmp_path / "out").stderr
    for text, words in (("[1]", "it has 1 entries"), ("{}", "it has dict"), ("[", "is no JSON")):
        ids.write_text(text)
        assert words in run(file, tmp_path / "out", "--image-ids", ids).stderr
    assert "in (0, 1]" in run(file, tmp_path / "out", "--keep-ratio", "3").stderr


# The method's table, mode by mode, in float64 and plain loops.


def cosines(tokens, prototypes):
    rows, columns = tokens.double().numpy(), prototypes.double().numpy()
    return [[float(x @ p / math.sqrt((x @ x) * (p @ p))) for p in columns] for x in rows]


def reference_scores(mode, c):
    if mode in ("high_info_patch", "high_info_patch_fix_num", "high_info_patch_flatten", "video_high_info_patch"):
        return [max(row) for row in c]
    over_j = [[math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in c]
    if mode == "high_info_patch_single_smx":
        return [max(row) for row in over_j]
    sums = [sum(math.exp(row[j]) for row in c) for j in range(len(c[0]))]
    return [max(math.exp(v) / sums[j] * s for j, (v, s) in enumerate(zip(row, r))) for row, r in zip(c, over_j)]


THRESHOLD = {"high_info_patch", "high_info_patch_flatten", "video_high_info_patch"}
RATIO = {
    "high_info_patch_fix_num": "cosine",
    "high_info_patch_double_smx": "double_softmax",
    "high_info_patch_single_smx": "softmax",
    "video_high_info_patch_double_smx": "double_softmax",
}
FRAMES = 3


def upstream_keeps(mode, tokens, prototypes, value):
    """Positions that upstream keeps; a video's frames one by one."""
    parts = tokens.split(len(tokens) // FRAMES) if mode.startswith("video") else [tokens]
    kept = []
    for part in parts:
        scores = reference_scores(mode, cosines(part, prototypes))
        if mode in THRESHOLD:
            kept.append([s < value for s in scores])
            continue
        if mode == "high_info_patch_fix_num":
            order = sorted(range(len(part)), key=lambda i, s=scores: s[i])[: round(len(part) * value)]
            kept.append([i in order for i in range(len(part))])
        else:  # the softmax modes round what they drop
            order = sorted(range(len(part)), key=lambda i, s=scores: -s[i])[: round(len(part) * (1 - value))]
            kept.append([i not in order for i in range(len(part))])
    return kept


def ours_keeps(mode, tokens, book, value):
    rule = {"threshold": value} if mode in THRESHOLD else {"keep_ratio": value, "score": RATIO[mode]}
    parts = tokens.split(len(tokens) // FRAMES) if mode.startswith("video") else [tokens]
    return [book.keep_mask(part, PruningConfig(**rule)).tolist() for part in parts]


def features(kind, prototypes, count=30):
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(count, prototypes.shape[1], generator=generator)
    picks = torch.randint(0, len(prototypes), (count,), generator=generator)
    near = prototypes.float()[picks]
    scale = near.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    little, much = (torch.linspace(0.05, end, count)[:, None] * scale for end in (0.5, 3))
    return {"random": noise, "all above": near + little * noise, "mixed": near + much * noise}[kind]


@pytest.fixture(scope="module")
def prototypes(source):
    return torch.load(source[0], map_location="cpu", weights_only=True).detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["random", "mixed", "all above"])
@pytest.mark.parametrize("mode", [*sorted(THRESHOLD), *RATIO])
def test_kept_sets_equal_the_written_out_method(prototypes, mode, kind, dtype):
    book = RedundancyCodebook(prototypes.to(dtype))
    tokens = features(kind, prototypes)
    values = (0.11, 0.45, 0.5) if mode in THRESHOLD else (0.1, 0.2, 0.5, 0.9)
    for value in values:
        kept, ours = upstream_keeps(mode, tokens, prototypes, value), ours_keeps(mode, tokens, book, value)
        for part, mine in zip(kept, ours, strict=True):
            # On purpose: no image or frame is ever emptied.
            assert mine == part if any(part) else sum(mine) == 1
        assert kind == "mixed" or mode not in THRESHOLD or value != 0.45 or all(map(any, kept)) == (kind == "random")


@pytest.mark.parametrize("mode", sorted(RATIO))
def test_ratio_one_keeps_all_where_upstream_fails(prototypes, mode):
    assert all(
        all(part) for part in ours_keeps(mode, features("mixed", prototypes), RedundancyCodebook(prototypes), 1.0)
    )


@pytest.mark.parametrize("mode", sorted(RATIO))
def test_ties_leave_the_count_exact(prototypes, mode):
    """Of equal tokens as many stay as the ratio asks for: which, upstream leaves to `topk`; here equal scores keep the
    earlier token, and equal tokens have equal scores but for the last bit of a matrix product."""
    tokens = features("mixed", prototypes)[:5].repeat_interleave(6, dim=0)
    book = RedundancyCodebook(prototypes)
    for part in ours_keeps(mode, tokens, book, 0.3):
        assert sum(part) == kept_token_count(len(part), 0.3)
        groups = [part[start : start + 6] for start in range(0, len(part), 6)]
        assert sum(any(group) and not all(group) for group in groups) <= 2


def test_softmax_modes_round_what_they_keep():
    """Upstream drops round(L*(1-ratio)) there, so half-way counts may differ by one: of 7 at 0.5 it keeps 3, we 4."""
    prototypes, tokens = torch.randn(5, 16), torch.randn(7, 16)
    upstream = upstream_keeps("high_info_patch_single_smx", tokens, prototypes, 0.5)
    ours = ours_keeps("high_info_patch_single_smx", tokens, RedundancyCodebook(prototypes), 0.5)
    assert (sum(upstream[0]), sum(ours[0])) == (3, 4) == (7 - round(3.5), round(3.5))
    assert all(mine or not theirs for mine, theirs in zip(ours[0], upstream[0]))
    differing = [n for n in range(1, 800) if n - round(n * 0.5) != round(n * 0.5)]
    assert differing and all(abs(n - 2 * round(n * 0.5)) == 1 for n in differing)


def test_repeated_prototypes_do_not_change_cosine_sets(prototypes):
    book = RedundancyCodebook(torch.cat([prototypes, prototypes[:3]]))
    single = RedundancyCodebook(prototypes)
    tokens = features("mixed", prototypes)
    for rule in ({"keep_ratio": 0.3}, {"threshold": 0.45}):
        settings = PruningConfig(**rule)
        assert np.array_equal(book.keep_mask(tokens, settings), single.keep_mask(tokens, settings))
