"""Peak memory of a training step by policy, each case in a process of its own, next to stock transformers.

    python benchmarks/memory.py                         # CPU: a small stack, 4k to 64k tokens
    python benchmarks/memory.py --shape qwen3-30b-a3b   # one GPU: layers of Qwen3-30B-A3B, 64k without SP

What is measured is the peak *above* what was there when the step began (weights and inputs):

    CPU   the kernel's own count of resident pages (VmHWM, reset before the step), with the C allocator told to give
          large blocks back at once
    GPU   torch.cuda.max_memory_allocated, reset before the step

A batch is tokens/4096 documents of 4096 tokens, one a row: stock SDPA builds a dense mask for packed rows, 4.3 GB at
64k. On a CPU "the host" is the same memory, so offloading is only measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

DOCUMENT = 4096
RESULTS = Path(__file__).parent / "results"
VOCAB = 151_936  # Qwen3's

SHAPES = {
    "small": {
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "vocab_size": 4096,
    },
    # Attention and experts of Qwen/Qwen3-30B-A3B; as many of its 48 layers as leave room on one card.
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": VOCAB,
    },
    # To see optimizers: many parameters, few tokens, and layers enough that one tensor is a few percent of the model.
    "wide": {
        "hidden_size": 256,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 4096,
    },
}

# name -> (stock transformers?, recompute, activation_offload)
STEPS = {
    "transformers": (True, "none", False),
    "transformers, gradient checkpointing": (True, "full", False),
    "recompute none": (False, "none", False),
    "recompute selective": (False, "selective", False),
    "recompute full": (False, "full", False),
    "recompute selective, activation offload": (False, "selective", True),
    "recompute full, activation offload": (False, "full", True),
}

# name -> (optimizer_states, optimizer_offload, optimizer_in_backward); None is torch's AdamW as stock trainers run it
OPTIMIZERS = {
    "torch AdamW": None,
    "optimizer_states bf16": ("bf16", False, False),
    "optimizer_in_backward": ("full", False, True),
    "optimizer_states bf16, optimizer_in_backward": ("bf16", False, True),
    "optimizer_offload": ("full", True, False),
    "optimizer_offload, optimizer_in_backward": ("full", True, True),
}


class Peak:
    """`with Peak(device) as peak:` ... `peak.bytes`, above what was there at the beginning."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._resident("VmRSS")
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        after = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self._resident("VmHWM")
        self.bytes = after - self.before

    @staticmethod
    def _resident(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {name}: measuring on a CPU needs Linux.")


def build(shape: str, stock: bool, device: torch.device):
    from transformers import AutoModelForCausalLM as StockModel
    from transformers import Qwen3MoeConfig, set_seed

    import xtuner_hf

    set_seed(0)
    config = Qwen3MoeConfig(**SHAPES[shape], norm_topk_prob=True, max_position_embeddings=1 << 17)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model_class = StockModel if stock else xtuner_hf.AutoModelForCausalLM
    with torch.device(device):
        model = model_class.from_config(config, dtype=dtype)
    return model.train()


def batch_of(model, tokens: int, device: torch.device) -> dict:
    ids = torch.randint(0, model.config.vocab_size, (max(tokens // DOCUMENT, 1), min(tokens, DOCUMENT)), device=device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def measure_step(shape: str, case: str, tokens: int, device: torch.device) -> dict:
    """Forward and backward of a layer stack with its head and loss."""
    from xtuner_hf.memory.recompute import set_recompute

    stock, recompute, offload = STEPS[case]
    model = build(shape, stock, device)
    if recompute != "none":
        if not stock:
            set_recompute(model, recompute, offload=offload, device=device)
        model.activation_checkpointing_enable()
    options = {} if stock else {"chunked_loss": True}
    model(**batch_of(model, 256, device), **options).loss.backward()  # libraries load and settle their buffers
    batch = batch_of(model, tokens, device)
    # Gradients of parameters exist before the step, as they do from the second micro-batch on: this is activations.
    with Peak(device) as peak:
        model(**batch, **options).loss.backward()
    return {"peak_bytes": peak.bytes, "seconds": round(peak.seconds, 2)}


def measure_optimizer(case: str, tokens: int, device: torch.device) -> dict:
    """Two optimizer steps over few tokens: gradients and states."""
    from xtuner_hf.memory.optimizer import StepsInBackward, optimizer_class

    model = build("wide", stock=False, device=device)
    batch = batch_of(model, tokens, device)
    model(**batch, chunked_loss=True).loss.backward()  # libraries load and settle their buffers
    model.zero_grad()
    states, offload, in_backward = OPTIMIZERS[case] or ("full", False, False)
    asked = SimpleNamespace(
        optimizer_states=states, optimizer_offload=offload, optimizer_in_backward=in_backward
    )  # the fields of a trainer's arguments
    optimizer = optimizer_class(torch.optim.AdamW, asked)(model.parameters(), lr=1e-4, fused=True)
    if in_backward:
        StepsInBackward(optimizer)
    with Peak(device) as peak:
        for _ in range(2):
            model(**batch, chunked_loss=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "peak_bytes": peak.bytes,
        "parameters": parameters,
        "bytes_per_parameter": round(peak.bytes / parameters, 2),
        "seconds": round(peak.seconds, 2),
    }


def measure_head(case: str, tokens: int, device: torch.device) -> dict:
    """Cross entropy over Qwen3's vocabulary at hidden size 64, forward and backward, fp32."""
    from xtuner_hf.memory.chunked_loss import chunked_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(tokens, 64, device=device, requires_grad=True)
    weight = torch.randn(VOCAB, 64, device=device, requires_grad=True)
    labels = torch.randint(0, VOCAB, (tokens,), device=device)
    # Libraries load and settle their buffers; gradients exist before, as they do from the second micro-batch on.
    chunked_cross_entropy(hidden[:256], weight, None, labels[:256]).backward()
    with Peak(device) as peak:
        if case == "full logits":
            loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
        else:
            loss = chunked_cross_entropy(hidden, weight, None, labels)
        loss.backward()
    one_logits_tensor = tokens * VOCAB * 4
    return {
        "peak_bytes": peak.bytes,
        "one_fp32_logits_tensor_bytes": one_logits_tensor,
        "peak_over_one_logits_tensor": round(peak.bytes / one_logits_tensor, 4),
        "seconds": round(peak.seconds, 2),
    }


def allocator_threshold(kind: str) -> int:
    """Bytes above which the C allocator gives freed blocks back at once; below, holes in the heap would count. Tiles of
    the head come and go thousands of times and stay below it."""
    return 1 << 24 if kind == "head" else 1 << 18


def run_case(kind: str, shape: str, case: str, tokens: int, device: str) -> dict:
    """Measure in a process of its own; an error (out of memory, say) is a result too."""
    command = [sys.executable, __file__, "--case", json.dumps([kind, shape, case, tokens, device])]
    threshold = str(allocator_threshold(kind))
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": threshold, "MALLOC_TRIM_THRESHOLD_": threshold}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    row = {"kind": kind, "shape": shape, "case": case, "tokens": tokens}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return row | {"error": lines[-1] if lines else f"killed by signal {-done.returncode}"}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


def measure(kind: str, shape: str, case: str, tokens: int, device_name: str) -> dict:
    device = torch.device(device_name)
    if kind == "step":
        return measure_step(shape, case, tokens, device)
    return {"optimizer": measure_optimizer, "head": measure_head}[kind](case, tokens, device)


def plan(shape: str, tokens: list[int], head_tokens: int, device: str) -> list[tuple[str, str, str, int]]:
    """All cases: (kind, shape, case, tokens)."""
    on_gpu = device != "cpu"
    cases = [("step", shape, name, n) for name, (*_, offload) in STEPS.items() for n in tokens if on_gpu or not offload]
    cases += [
        ("optimizer", "wide", name, 16)
        for name, options in OPTIMIZERS.items()
        if on_gpu or options is None or not options[1]
    ]
    # Full logits at short lengths alone: the longest would be 60 GB.
    cases += [("head", "head", case, short) for short in (2048, 4096) for case in ("full logits", "chunked")]
    return [*cases, ("head", "head", "chunked", head_tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "wide"], default="small")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--head_tokens", type=int, default=32768, help="Tokens of the chunked head's longest case.")
    parser.add_argument("--kinds", nargs="+", default=["step", "optimizer", "head"], help="The rest is kept as it was.")
    parser.add_argument("--output", type=Path, help="JSON; by default benchmarks/results/memory_SHAPE_DEVICE.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*json.loads(args.case))))
        return
    output = args.output or RESULTS / f"memory_{args.shape}_{args.device}.json"
    known = json.loads(output.read_text())["rows"] if output.exists() else []
    rows = [row for row in known if row["kind"] not in args.kinds]
    for case in plan(args.shape, args.tokens, args.head_tokens, args.device):
        if case[0] not in args.kinds:
            continue
        row = run_case(*case, args.device)
        rows.append(row)
        write(output, rows, args.device)  # a run that is cut short leaves what it has
        peak = f"{row['peak_bytes'] / 2**20:10,.0f} MiB" if "peak_bytes" in row else row["error"]
        print(f"{row['kind']:10} {row['case']:46} {row['tokens']:6} tokens {peak}", flush=True)


def write(output: Path, rows: list[dict], device: str) -> None:
    import transformers

    facts = {
        "device": torch.cuda.get_device_name() if device != "cpu" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "document_tokens": DOCUMENT,
        "measure": "torch.cuda.max_memory_allocated" if device != "cpu" else "VmHWM - VmRSS before the step",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"facts": facts, "shapes": SHAPES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
