"""The stages of InternVL, one after the other on one checkpoint: what is frozen, how fast the rest learns.

    accelerate launch --config_file accelerate_configs/gpu_8.yaml examples/vision_stages.py --stage sft-3.5 \
        --model OpenGVLab/InternVL3_5-30B-A3B-HF --train_file conversations.jsonl --output_dir out --bf16 --ep_size 8

Rows of `--train_file` are conversations with images, or texts with images for the first stages
(`{"messages": [{"role": "pretrain", "content": [...]}]}`); docs/vision-data.md shows their shapes. Every argument of
`MoESFTConfig` may be given and goes before the stage's. `python examples/vision_stages.py --list` prints the table.

Sources: InternVL2.5 (arXiv 2412.05271), InternVL3 (arXiv 2504.10479), InternVL3.5 (arXiv 2508.18265) and the scripts in
InternVL's repository. Not in the papers, and chosen here: warm-up of 3 % of the steps, and the projector's learning
rate, which is that of the rest. After SFT come preferences: `MoEMPOTrainer` with its defaults (0.8 DPO + 0.2 BCO +
1.0 likelihood of the chosen) and a learning rate of 2e-7.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser, set_seed

from xtuner_hf import MoESFTConfig, MoESFTTrainer
from xtuner_hf.data import InternVLProcessor, load_conversations

SHORT, LONG = {"max_length": 16384}, {"max_length": 32768}
PROJECTOR = {"freeze_vision": True, "freeze_language": True}
# InternVL's loss_reduction="square", and stochastic depth in the tower: more of it in the largest models.
ALL = {"loss_weighting": "sqrt", "drop_path_rate": 0.1}
LARGEST = {"loss_weighting": "sqrt", "drop_path_rate": 0.4}
STAGES: dict[str, dict[str, Any]] = {
    # The projector learns to speak to a language model that stays as it is.
    "projector-2.5": {**PROJECTOR, **SHORT, "learning_rate": 2e-4},
    "projector-3.5": {**PROJECTOR, **LONG, "learning_rate": 1e-3},
    # The tower too, for kinds of images that it has not seen.
    "vision-2.5": {**SHORT, "freeze_language": True, "learning_rate": 1e-5, "drop_path_rate": 0.1},
    # Everything, on text and images mixed; InternVL3 begins with such a stage, 2e-5 is InternVL3.5's.
    "pretrain-3.5": {**ALL, **LONG, "learning_rate": 2e-5},
    "sft-2.5-8b": {**ALL, **SHORT, "learning_rate": 4e-5, "weight_decay": 0.05},
    "sft-2.5-78b": {**LARGEST, **SHORT, "learning_rate": 2e-5, "weight_decay": 0.05},
    "sft-3.5": {**ALL, **LONG, "learning_rate": 8e-5},
    "sft-3.5-241b": {**LARGEST, **LONG, "learning_rate": 2e-5},
}
COMMON: dict[str, Any] = {
    "packing": True,
    "assistant_only_loss": True,
    "max_row_tiles": 12,  # cells of all images of a row together, as InternVL trains
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "balance_batches": True,
    "dataloader_num_workers": 4,
}


@dataclass
class ScriptArguments:
    """What to train, on what."""

    stage: str = field(metadata={"help": f"One of {', '.join(STAGES)}."})
    model: str = field(metadata={"help": "Checkpoint: a folder or a name on the Hub, in transformers' layout."})
    train_file: str = field(metadata={"help": "jsonl of conversations or texts with images."})
    on_bad_row: str = field(default="error", metadata={"help": "'error' or 'skip' (and count) malformed rows."})


def stage_arguments(stage: str, given: list[str]) -> list[str]:
    """The stage's arguments for the command line, but for those that are given there."""
    names = {argument.split("=")[0] for argument in given}
    return [
        part
        for name, value in {**COMMON, **STAGES[stage]}.items()
        if f"--{name}" not in names and f"--no_{name}" not in names
        for part in (f"--{name}", str(value))
    ]


def main() -> None:
    if "--list" in sys.argv:
        print("\n".join(f"{stage:15} {settings}" for stage, settings in STAGES.items()))
        return
    given = sys.argv[1:]
    parser = HfArgumentParser((ScriptArguments, MoESFTConfig))
    if {"-h", "--help"} & set(given):
        parser.print_help()
        return
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--stage", choices=STAGES, required=True)
    stage = first.parse_known_args(given)[0].stage
    script, args = parser.parse_args_into_dataclasses(stage_arguments(stage, given) + given)
    set_seed(args.seed)
    trainer = MoESFTTrainer(
        model=script.model,
        args=args,
        train_dataset=load_conversations(script.train_file, on_bad_row=script.on_bad_row),
        processing_class=InternVLProcessor.from_pretrained(script.model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
