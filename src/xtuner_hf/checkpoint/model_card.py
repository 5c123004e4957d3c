"""The model card of a training run: what the parent trainer writes, with its statements about origins made true.

transformers' and TRL's cards infer where weights and data come from: a model with random weights or from a local folder
becomes "a fine-tuned version of [None]", and rows that a generator made become a data set called "generator".
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard

TAG = "xtuner_hf"


def correct_card(
    path: Path, *, trainer: str, parent: str, version: str, loaded_from: str | None, data_is_named: bool, pushed: bool
) -> None:
    """Rewrite the metadata and the introduction of the card at `path`, and keep its other sections.

    Args:
        trainer, parent: class names, "MoESFTTrainer" and "trl.SFTTrainer" say.
        version: of this package.
        loaded_from: where the weights were read from, an absolute path or a name on the Hub; None if they were random.
        data_is_named: whether the user named the data set. Otherwise the parent's guess is left out.
        pushed: whether the model has a name on the Hub; without one, the parent's quick start has none to load.
    """
    card = ModelCard.load(path)
    base_model = loaded_from if loaded_from and not Path(loaded_from).is_absolute() else None
    card.data.base_model = base_model
    if not data_is_named:
        card.data.datasets = None
    card.data.tags = sorted({*(card.data.tags or []), TAG})
    heading, *sections = re.split(r"(?m)^(?=## )", card.text.lstrip())
    title = re.search(r"(?m)^# .*$", heading)
    origin = f"a fine-tuned version of [{base_model}](https://huggingface.co/{base_model})" if base_model else None
    if origin is None:
        origin = "a fine-tuned version of a local checkpoint" if loaded_from else "a model trained from random weights"
    sentences = f"This is {origin}{_on_datasets(card.data.datasets)}.\n"
    sentences += f"It was trained with `{trainer}` of xtuner_hf {version}, an extension of `{parent}`.\n"
    kept = [section for section in sections if pushed or not section.startswith("## Quick start")]
    card.text = f"\n{title[0] if title else '# Model card'}\n\n{sentences}\n{''.join(kept)}"
    card.save(path)


def _on_datasets(datasets: str | list[str] | None) -> str:
    names = [datasets] if isinstance(datasets, str) else datasets or []
    return f" on {' and '.join(names)}" if names else ""
