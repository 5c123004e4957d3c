"""The private names that `_compat.py` leans on: this fails when transformers, TRL or torch moves or changes one."""

from __future__ import annotations

import dataclasses
import inspect

import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.utils import PushToHubMixin
from trl import DPOTrainer, SFTTrainer

from xtuner_hf import _compat


def test_transformers_knows_the_collectives_of_all_our_devices():
    from transformers.distributed.utils import get_distributed_backend

    import xtuner_hf.parallel.shard  # noqa: F401  # registers them
    from xtuner_hf.device import KINDS

    assert [get_distributed_backend(kind.type) for kind in KINDS] == [kind.collectives for kind in KINDS]


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures():
    assert parameters(_compat.get_checkpoint_conversion_mapping) == ["model_type"]
    assert parameters(_compat.register_checkpoint_conversion_mapping) == [
        "model_type_or_class_name",
        "mapping",
        "overwrite",
    ]
    assert parameters(_compat.revert_weight_conversion) == ["model", "state_dict"]
    assert parameters(_compat.initialize_distributed_mesh) == ["distributed_config"]
    assert parameters(_compat.compute_local_shape_and_global_offset)[:3] == ["global_shape", "mesh", "placements"]
    assert parameters(_compat.optimal_tiled_canvas) == [
        "original_image_size",
        "target_tile_size",
        "min_image_tiles",
        "max_image_tiles",
    ]
    assert _compat.optimal_tiled_canvas((1080, 1920), (448, 448), 1, 12) == (4, 2), "columns, rows"
    assert _compat.parse_size_to_int("5GB") == 5 * 10**9
    assert parameters(_compat.apply_expert_parallelism) == ["model", "ep_mesh", "tp_mesh", "plan", "ep_implementation"]
    assert parameters(_compat.apply_fully_sharded_data_parallelism) == [
        "model",
        "mesh_manager",
        "fsdp_plan",
        "ep_plan",
    ]
    assert parameters(_compat.TransformersDeviceMesh.get_mesh) == ["self", "dims"]
    assert parameters(_compat.EPImplementation.__init__) == ["self", "experts", "ep_mesh", "tp_mesh"]
    assert parameters(_compat.OutputRecorder)[:2] == ["target_class", "index"]
    assert parameters(_compat.ChunkedLogProbFunction.forward)[1:] == [
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ]


def test_methods_that_models_and_trainers_override():
    """Where saving and pushing pass through; a method that transformers no longer calls would be skipped in silence."""
    assert parameters(PushToHubMixin._upload_modified_files)[:4] == [
        "self",
        "working_dir",
        "repo_id",
        "files_timestamps",
    ]
    for saving in (PushToHubMixin.push_to_hub, PreTrainedModel.save_pretrained):
        assert "self._upload_modified_files(" in inspect.getsource(saving)
    source = inspect.getsource(PreTrainedModel.save_pretrained)
    for name in ("gather_sharded_state_dict_for_save", "barrier_after_gathered_checkpoint_save"):
        assert f"self.{name}(" in source
    assert parameters(PreTrainedModel.barrier_after_gathered_checkpoint_save) == ["self", "distributed_config"]
    assert parameters(PreTrainedModel.should_save_on_this_rank) == ["self", "is_main_process"]
    assert parameters(Trainer.save_model) == ["self", "output_dir", "_internal_call"]
    # Only a checkpoint-N is saved by the trainer itself and with a folder.
    assert "self.save_model(output_dir, _internal_call=True)" in inspect.getsource(Trainer._save_checkpoint)
    assert "self.save_model(_internal_call=True)" in inspect.getsource(Trainer.push_to_hub)
    assert parameters(_compat.add_fused_lm_head) == ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]
    assert parameters(_compat.disable_dropout_in_model) == ["model"]


def test_methods_of_the_trainer_that_ours_replace_or_call():
    """`trainers/checkpointing.py` and `trainers/stability.py` stand in for these."""
    expected = {
        "_save_checkpoint": ["model", "trial"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_load_best_model": [],
        "_save_rng_state": ["output_dir"],
        "_load_rng_state": ["checkpoint"],
        "_save_scaler": ["output_dir"],
        "_get_output_dir": ["trial"],
        "_get_grad_norm": ["model", "grad_norm"],
        "_finalize_training": ["trial", "num_train_samples", "start_time"],
        "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
        "_get_num_items_in_batch": ["batch_samples", "device"],
        "save_model": ["output_dir", "_internal_call"],
        "_sync_replicated_trainable_parameters": ["model"],
    }
    for name, names in expected.items():
        assert parameters(getattr(Trainer, name))[1:] == names, name


def test_plans_of_models_that_read_images():
    """`models/internvl` has FSDP plans of its own, and drops that of every configuration, a language model's."""
    assert "self.init_parallel_plans()" in inspect.getsource(PreTrainedModel.post_init)
    assert "self._fsdp_plan.update(self.config.base_model_fsdp_plan" in inspect.getsource(
        PreTrainedModel.init_parallel_plans
    )
    assert set(PreTrainedConfig.base_model_fsdp_plan) == {"embed_tokens", "layers.*", "norm"}


def test_the_collator_of_preferences_with_images():
    """`data/preference.py` halves what it hands to the processor: all pairs, twice one behind the other."""
    collator = _compat.DataCollatorForVisionPreference
    source = inspect.getsource(collator.torch_call)
    assert 'images = [example["images"] for example in examples] * 2' in source
    assert 'prompts = [example["prompt"] for example in examples] * 2' in source
    assert "processor" in {field.name for field in dataclasses.fields(collator)}


def test_wrappers_of_peft_around_expert_parameters():
    """`moe/lora.py` makes a subclass of them; `parallel/adapters.py` and `checkpoint/adapter.py` read their parts."""
    experts = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 6, 5))
    experts.down_proj = torch.nn.Parameter(torch.zeros(4, 5, 3))
    model = torch.nn.Sequential(experts)
    names = ["0.gate_up_proj", "0.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))
    outer = adapted.get_base_model()[0]
    inner = outer.base_layer
    assert type(outer) is type(inner) is ParamWrapper
    assert [outer.parameter_name, inner.parameter_name] == ["down_proj", "gate_up_proj"]
    assert outer.get_base_layer() is inner.get_base_layer() is experts
    shapes = [
        [tuple(w.lora_A["default"].weight.shape), tuple(w.lora_B["default"].weight.shape)] for w in (outer, inner)
    ]
    assert shapes == [[(8, 3), (5, 8)], [(8, 5), (6, 8)]]
    assert (outer.num_experts, outer.scaling, outer.active_adapters) == (4, {"default": 4.0}, ["default"])
    assert (outer.use_dora, outer.lora_bias, outer.merged) == ({"default": False}, {"default": False}, False)
    assert adapted.base_model.prefix == "lora_"


def test_state_of_the_trainer_that_a_checkpoint_holds():
    source = inspect.getsource(Trainer._inner_training_loop)
    for name in ("self._tr_loss = ", "self._globalstep_last_logged = "):
        assert name in source
    assert source.index("self._tr_loss = ") < source.index("on_train_begin")


def test_flash_attention_for_cpu():
    query = torch.zeros(1, 2, 3, 4)
    output, lse = _compat.cpu_flash_attention(query, query, query, torch.zeros(1, 1, 3, 3), 1.0)
    assert output.shape == query.shape
    assert lse.shape == (1, 2, 3)
    grads = _compat.cpu_flash_attention_backward(output, query, query, query, output, lse, None, 1.0)
    assert [grad.shape for grad in grads] == [query.shape] * 3


def test_flash_attention_for_cuda():
    """By name, and torch's own by their declarations; nothing runs here."""
    names = parameters(_flash_attention_forward)
    assert names[:6] == ["query_states", "key_states", "value_states", "attention_mask", "query_length", "is_causal"]
    for name in ("softmax_scale", "sliding_window", "cu_seq_lens_q", "max_length_q", "attn_implementation"):
        assert name in names
    forward, backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    shared = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    names = [argument.name for argument in forward.default._schema.arguments]
    assert names[:10] == ["query", "key", "value", *shared, "return_debug_mask"]
    names = [argument.name for argument in backward.default._schema.arguments]
    assert names[:14] == ["grad_out", "query", "key", "value", "out", "logsumexp", *shared, "rng_state", "unused"]


def test_conversion_operations():
    assert "model" in parameters(transformers.core_model_loading.Split.convert)
    assert isinstance(inspect.getattr_static(_compat.ConversionOps, "reverse_op"), property)
    assert parameters(_compat.WeightConverter)[:3] == ["source_patterns", "target_patterns", "operations"]


def test_experts_modules_say_how_their_weights_lie():
    """What `moe/experts.py` reads off any experts module of transformers."""
    config = transformers.GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    experts = GptOssExperts(config)
    assert (experts.is_transposed, experts.has_bias) == (True, True)
    assert experts._apply_gate(torch.zeros(3, 16)).shape == (3, 8)
    experts = DeepseekV3Experts(transformers.DeepseekV3Config(hidden_size=8, moe_intermediate_size=8))
    assert (experts.is_transposed, experts.has_bias) == (False, False)
    assert experts._apply_gate(torch.zeros(3, 16)).shape == (3, 8)


def test_models_name_their_tied_weights():
    config = transformers.Qwen3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, tie_word_embeddings=True
    )
    model = transformers.Qwen3ForCausalLM(config)
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_what_sharding_a_model_leans_on():
    """parallel/shard.py does what `maybe_distribute_model` does; these are the names that it sets and calls."""
    source = inspect.getsource(PreTrainedModel.maybe_distribute_model)
    for name in (
        "_mesh_manager",
        "_device_mesh",
        "_is_distributed_loading_by_transformers",
        "_tp_size",
        "_fsdp_size",
        "_resolve_parallel_plans",
    ):
        assert f"model.{name}" in source
    assert parameters(PreTrainedModel._resolve_parallel_plans) == ["self", "distributed_config"]
    assert parameters(PreTrainedModel._expand_parallel_plan) == ["self", "plan"]


def test_what_gathering_in_fp8_leans_on():
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    assert parameters(FSDPParam._init_extensions) == ["self"]
    gather = inspect.getsource(FSDPParam.all_gather_inputs.fget)
    assert "fsdp_pre_all_gather" in gather
    # Of a group of one rank, FSDP takes one tensor: kernels/fp8_weights.py packs its two.
    assert "all_gather_inputs[0]" in inspect.getsource(FSDPParamGroup.wait_for_unshard)
    assert "_fsdp_param_group" in inspect.getsource(_compat.FSDPModule.reshard)
    assert "and not self._reset_sharded_params" in inspect.getsource(FSDPParamGroup.lazy_init)


def test_what_the_trainers_hook_into():
    assert parameters(Trainer._build_accelerator_args) == ["self", "kwargs"]
    assert parameters(Trainer.create_accelerator_and_postprocess) == ["self"]
    assert parameters(Trainer._prepare_for_training) == [
        "self",
        "max_steps",
        "train_dataloader",
        "resume_from_checkpoint",
    ]
    assert "self.accelerator.prepare(self.model, self.optimizer)" in inspect.getsource(Trainer._prepare_for_training)


def test_accelerate_still_makes_ddp_of_fsdp_on_cpu():
    """What `use_fsdp_on_cpu` works around: MULTI_CPU is missing where other devices become FSDP."""
    source = inspect.getsource(AcceleratorState.__init__)
    promoted = source[source.index("elif self.distributed_type in [") :]
    assert "MULTI_GPU" in promoted
    assert "MULTI_CPU" not in promoted
    assert "self.fsdp_plugin = fsdp_plugin" in promoted
    assert "self.state.device_mesh = self.parallelism_config" in inspect.getsource(Accelerator.__init__)


def test_methods_that_we_override():
    assert parameters(PreTrainedModel._set_gradient_checkpointing) == [
        "self",
        "enable",
        "gradient_checkpointing_func",
        "every_n_layers",
    ]
    assert parameters(Trainer._get_grad_norm) == ["self", "model", "grad_norm"]


def test_names_of_trl():
    assert parameters(_compat.has_generation_markers) == ["chat_template"]
    assert parameters(_compat.is_chat_template_stop_token_trained) == ["processing_class", "chat_template"]
    assert parameters(_compat.global_then_local_main_first) == []
    assert [field.name for field in dataclasses.fields(_compat.DataCollatorForLanguageModeling)] == [
        "pad_token_id",
        "padding_free",
        "return_position_ids",
        "pad_to_multiple_of",
        "return_tensors",
    ]


def test_methods_of_parents_that_trainers_override():
    assert parameters(SFTTrainer._prepare_dataset)[1:] == [
        "dataset",
        "processing_class",
        "args",
        "packing",
        "formatting_func",
        "dataset_name",
    ]
    assert parameters(Trainer._set_signature_columns_if_needed) == ["self"]


def test_what_lmdeploy_changes_in_a_handle():
    """It puts its own device in the place of argument 6 of what `reduce_tensor` returns for a CUDA tensor."""
    from torch.multiprocessing import reductions

    assert parameters(_compat.reduce_tensor) == ["tensor"]
    assert "rebuild_cuda_tensor," in inspect.getsource(reductions.reduce_tensor)
    assert parameters(reductions.rebuild_cuda_tensor)[6] == "storage_device"


def test_what_sequence_parallelism_leans_on():
    """Names by which transformers, TRL and accelerate count ranks that share a batch."""
    assert "self.get_tp_size() * self.get_cp_size()" in inspect.getsource(Trainer._get_num_items_in_batch)
    assert "self.get_cp_size()" in inspect.getsource(Trainer.get_total_train_batch_size)
    assert "sampler, BatchRebalanceSampler" in inspect.getsource(Trainer._get_dataloader)  # dealt out to ranks already
    assert parameters(BatchRebalanceSampler._assign) == ["self", "indices", "lengths"]
    assert parameters(Trainer._get_train_sampler) == ["self", "train_dataset"]
    for trainer in (SFTTrainer, DPOTrainer):
        assert "num_tokens_in_batch // self._tp_size" in inspect.getsource(trainer)
    source = inspect.getsource(prepare_data_loader)
    assert "process_index // (submesh_tp_size * submesh_cp_size)" in source
    assert "submesh_fsdp_size * submesh_dp_size" in source
    assert "torch_device_mesh=device_mesh" in inspect.getsource(Accelerator.prepare_data_loader)


def test_several_gpus_in_one_process():
    """What makes transformers wrap a model in DataParallel."""
    args = TrainingArguments(use_cpu=True, report_to=[])
    args._n_gpu = 8
    _compat.use_one_device(args)
    assert args.n_gpu == 1
    assert "self.args.n_gpu > 1" in inspect.getsource(Trainer._wrap_model)
