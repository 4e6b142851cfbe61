"""Why a token was dropped, in words and as patches."""

import pytest
import torch
from PIL import Image

from transformers_rbl import RedundancyCodebook
from transformers_rbl.evaluation.explain import explain, plot_explanations


@pytest.fixture
def codebook():
    return RedundancyCodebook(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))


PROVENANCE = [
    {"image": f"{n}.png", "position": str(4 + n), "word_1": "sky", "word_2": "a_$b", "word_3": ""} for n in range(3)
]


def test_each_token_gets_its_nearest_prototype(codebook):
    tokens = codebook.prototypes[[2, 0, 1]] * 5 + 0.01
    found = explain(codebook, tokens, PROVENANCE)
    assert [item.prototype for item in found] == [2, 0, 1] and found[0].image == "2.png" and found[0].position == 6
    torch.testing.assert_close(torch.tensor([item.score for item in found]), codebook.score(tokens))
    assert str(found[0]).startswith(
        "token 0 is redundant because it looks (cosine 1.00) like token 6 of 2.png, of which"
    )
    with pytest.raises(ValueError, match="2 rows, but the codebook 3"):
        explain(codebook, tokens, PROVENANCE[:2])


def test_pairs_of_patches(codebook, tmp_path):
    found = explain(codebook, torch.randn(16, 8), PROVENANCE)
    image = Image.new("RGB", (40, 40), "red")
    sources = {"0.png": image, "2.png": image}
    count = sum(item.image in sources for item in found)
    assert plot_explanations(image, found, sources, 4, tmp_path / "pairs.png", most=4) == min(4, count)
    assert Image.open(tmp_path / "pairs.png").size[0] > 200
    with pytest.raises(ValueError, match="source images"):
        plot_explanations(image, found, {}, 4, tmp_path / "none.png")
