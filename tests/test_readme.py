"""The README's `train.py` runs as it stands: only the checkpoint's name and the machine differ here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.data.chat import tiny_tokenizer
from tests.tiny import build, moe_config
from xtuner_hf import Qwen3MoeForCausalLM

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_train_py_of_the_readme_runs(tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(script.splitlines()) <= 15
    tokenizer = tiny_tokenizer()
    build(Qwen3MoeForCausalLM, moe_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(9)
    ]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.py").write_text(
        script.replace("Qwen/Qwen3-30B-A3B", "tiny").replace("bf16=True", "bf16=False, use_cpu=True, logging_steps=1")
    )
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, check=True, timeout=200)
    assert {"config.json", "model.safetensors", "training.png", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
