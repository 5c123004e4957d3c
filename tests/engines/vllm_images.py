"""Greedy completions of prompts with and without an image from vLLM; runs in the environment that `make engine` builds.

    python vllm_images.py request.json answer.json

Request: {"models": {name: folder}, "image": file, "prompts": {name: text}, "max_tokens": n}. A prompt with the image's
placeholder gets the image. Answer, under each model and prompt: {"prompt": [ids], "tokens": [n ids], "logprobs": [n]}.

vLLM's processor for InternVL imports torchvision, whose operators are compiled for another build of torch. They are of
object detection; declared without an implementation they let the rest, which resizes images, be imported. torchvision
stands in a folder of its own, on the path of this script alone: all else would try to import it and fail.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

PLACEHOLDER = "<IMG_CONTEXT>"


def declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def serve(folder: str, image: str, prompts: dict[str, str], max_tokens: int) -> dict:
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        kv_cache_memory_bytes=2**26,
        limit_mm_per_prompt={"image": 1, "video": 0},
        trust_remote_code=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, detokenize=False)
    answers = {}
    for name, prompt in prompts.items():
        shown = {"multi_modal_data": {"image": Image.open(image)}} if PLACEHOLDER in prompt else {}
        result = engine.generate([{"prompt": prompt, **shown}], sampling, use_tqdm=False)[0]
        tokens = list(result.outputs[0].token_ids)
        answers[name] = {
            "prompt": list(result.prompt_token_ids),
            "tokens": tokens,
            "logprobs": [
                position[token].logprob for token, position in zip(tokens, result.outputs[0].logprobs, strict=True)
            ],
        }
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return answers


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    arguments = request["image"], request["prompts"], request["max_tokens"]
    answer = {name: serve(folder, *arguments) for name, folder in request["models"].items()}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":  # vLLM may start processes that import this file
    operators = declare_operators()  # they go with the library
    main()
