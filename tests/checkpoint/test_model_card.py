from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from xtuner_hf.checkpoint.model_card import correct_card

# As TRL writes one for a model that it knows no origin of.
CARD = """---
base_model: None
datasets: generator
library_name: transformers
tags:
- sft
---

# Model Card for out

This model is a fine-tuned version of [None](https://huggingface.co/None).
It has been trained using [TRL](https://github.com/huggingface/trl).

## Quick start

```python
generator = pipeline("text-generation", model="None")
```

## Training procedure

This model was trained with SFT.
"""


@pytest.fixture
def corrected(tmp_path: Path):
    def correct(**changes) -> ModelCard:
        path = tmp_path / "README.md"
        path.write_text(CARD)
        values = {"loaded_from": None, "data_is_named": False, "pushed": False}
        correct_card(path, trainer="MoESFTTrainer", parent="trl.SFTTrainer", version="1.2", **(values | changes))
        return ModelCard.load(path)

    return correct


def test_random_weights(corrected):
    card = corrected()
    assert "# Model Card for out\n\nThis is a model trained from random weights.\n" in card.text
    assert "It was trained with `MoESFTTrainer` of xtuner_hf 1.2, an extension of `trl.SFTTrainer`.\n" in card.text
    assert "## Training procedure\n\nThis model was trained with SFT." in card.text
    assert "None" not in card.content
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert card.data.tags == ["sft", "xtuner_hf"]


def test_a_local_checkpoint_is_no_name_on_the_hub(corrected):
    card = corrected(loaded_from="/data/private/qwen")
    assert "This is a fine-tuned version of a local checkpoint." in card.text
    assert "/data" not in card.content
    assert card.data.base_model is None


def test_a_model_of_the_hub_and_a_named_data_set(corrected):
    card = corrected(loaded_from="Qwen/Qwen3-30B-A3B", data_is_named=True, pushed=True)
    assert "[Qwen/Qwen3-30B-A3B](https://huggingface.co/Qwen/Qwen3-30B-A3B) on generator." in card.text
    assert card.data.base_model == "Qwen/Qwen3-30B-A3B"
    assert card.data.datasets == "generator"
    assert "## Quick start" in card.text


def test_correcting_twice_changes_nothing(corrected, tmp_path):
    first = corrected(pushed=True).content
    (tmp_path / "README.md").write_text(first)
    keywords = {"loaded_from": None, "data_is_named": False, "pushed": True}
    correct_card(tmp_path / "README.md", trainer="MoESFTTrainer", parent="trl.SFTTrainer", version="1.2", **keywords)
    assert ModelCard.load(tmp_path / "README.md").content == first
