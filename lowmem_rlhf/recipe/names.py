"""What other programs call the keys of a recipe, for the suggestion beside an unknown key."""

import difflib

from pydantic import BaseModel

from lowmem_rlhf.suggest import did_you_mean

_STEPS = "a step has training.prompts_per_step examples, and hardware.micro_batch_tokens says how it is cut"
_PRECISION = "set hardware.compute_dtype"
_RECOMPUTE = "set hardware.gradient_checkpointing"
_OPTIMIZER = "set hardware.optim, training.learning_rate and training.weight_decay"
_EVALUATION = "held-out data is data.eval with data.eval_size, measured before and after, and every evaluation.steps"
_SAVING = "set training.save_steps and training.save_total_limit"
_LENGTH = "nothing is cut off: trl.max_length bounds an example, data.long_prompts says what happens to longer ones"
_REFERENCE = "the reference is the base on the card, or the frozen adapter that `adapter` names"
_TOKENS = "examples are tokenized as everywhere in this package, see data"
_BASE = "set model, revision and trust_remote_code"
_SEVERAL = "several cards are for `train --processes N`; a base that none of them holds is for hardware.shard_base"
_VLLM = "set generation.engine to vllm; generation.server says where it is, or how it is started"
_TOOLS = "a rollout calls no tools; conversations with tool calls are data.messages"
_DROPOUT = "dropout is always off"

# keys of TRL's configurations (and of transformers' under them) that the recipe says elsewhere
DECIDED: dict[str, str] = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"), _STEPS),
    **dict.fromkeys(("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval"), _PRECISION),
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs"), _RECOMPUTE),
    **dict.fromkeys(("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"), _OPTIMIZER),
    **dict.fromkeys(("eval_strategy", "eval_steps", "per_device_eval_batch_size", "do_eval"), _EVALUATION),
    **dict.fromkeys(("save_strategy", "logging_steps", "logging_strategy"), _SAVING),
    **dict.fromkeys(("truncation_mode", "max_prompt_length", "max_completion_length"), _LENGTH),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _REFERENCE),
    **dict.fromkeys(("pad_token", "padding_value", "dataset_num_proc", "padding_free", "pad_to_multiple_of"), _TOKENS),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code", "is_encoder_decoder"), _BASE),
    **{key: f"set training.{key}" for key in ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")},
    **{key: f"set training.{key}" for key in ("max_grad_norm", "max_steps", "num_train_epochs", "seed")},
    **{key: f"set training.{key}" for key in ("save_steps", "save_total_limit", "report_to")},
    "warmup_ratio": "set training.warmup_steps",
    "output_dir": "give --output",
    "use_cpu": "set hardware.device",
    "disable_dropout": _DROPOUT,
    "activation_offloading": "set hardware.offload_checkpoints",
    "precompute_ref_log_probs": f"{_REFERENCE}; it takes no memory of its own",
    "precompute_ref_batch_size": f"{_REFERENCE}; it takes no memory of its own",
    "router_aux_loss_coef": "the base, its router included, is frozen",
    "use_weighting": "it needs sums over all of the vocabulary that are not kept here",
    "generate_during_eval": "give the recipe rewards, and held-out completions are sampled and judged",
    "load_best_model_at_end": "set evaluation.keep_best",
    "metric_for_best_model": "set evaluation.metric",
    "greater_is_better": "set evaluation.greater_is_better",
    "push_to_hub": "use `lowmem-rlhf export RUN --push REPO`",
}

# names of TRL, transformers, peft and others, and short ones that people type, by what a recipe calls it
_ALSO: dict[str, str] = {
    "training.learning_rate": "lr learningrate step_size",
    "training.prompts_per_step": (
        "batch_size bs train_batch_size per_device_train_batch_size global_batch_size generation_batch_size "
        "steps_per_generation local_rollout_forward_batch_size"
    ),
    "hardware.micro_batch_tokens": "gradient_accumulation_steps grad_accum micro_batch_size",
    "training.num_train_epochs": "epochs epoch num_epochs n_epochs train_epochs",
    "training.max_steps": "steps num_steps n_steps total_steps train_steps iters total_episodes",
    "training.warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "training.lr_scheduler_type": "scheduler lr_scheduler lr_schedule",
    "training.max_grad_norm": "grad_clip clip_grad_norm gradient_clipping max_norm",
    "training.weight_decay": "wd",
    "training.seed": "random_seed random_state",
    "training.save_steps": "save_every save_interval checkpoint_steps",
    "training.report_to": "logger tracker wandb tensorboard",
    "training.log_completions": "num_sample_generations num_completions_to_print",
    "evaluation.steps": "eval_steps eval_every eval_interval evaluation_steps",
    "evaluation.keep_best": "load_best_model_at_end save_best keep_best_checkpoint",
    "evaluation.metric": "metric_for_best_model monitor",
    "evaluation.patience": "early_stopping_patience early_stopping",
    "evaluation.min_delta": "early_stopping_threshold",
    "sft.max_length generation.max_completion_length data.max_prompt_length": (
        "max_seq_length max_seq_len seq_len sequence_len context_length cutoff_len"
    ),
    "data.max_prompt_length": "max_prompt_len prompt_length",
    "lora": "peft_config lora_config",
    "lora.r": "rank lora_r lora_rank",
    "lora.lora_alpha": "alpha",
    "lora.target_modules": "lora_target_modules targets modules",
    "lora.use_rslora": "rslora rs_lora",
    "lora.layers_to_transform": "layers lora_layers",
    "generation.num_generations": "n num_return_sequences num_samples_per_prompt group_size rollouts num_rollouts",
    "generation.max_completion_length": "max_new_tokens max_tokens response_length max_response_length max_gen_len",
    "generation.temperature": "temp",
    "generation.engine": "rollout_engine inference_engine backend",
    "generation.server.url": "vllm_server_base_url vllm_server_host vllm_server_port server_url base_url",
    "generation.server.timeout": "vllm_server_timeout",
    "generation.server.gpu_memory_utilization": "gpu_memory_utilization vllm_gpu_memory_utilization",
    "generation.server.sleep": "vllm_enable_sleep_mode enable_sleep_mode",
    "generation.stop_strings": "stop stop_token stop_token_id stop_sequences",
    "grpo.beta ppo.kl_coef": "kl kl_coeff init_kl_coef kl_beta kl_weight kl_penalty",
    "grpo.epsilon ppo.cliprange": "eps clip clip_eps clip_range clip_ratio",
    "data.train": "dataset datasets dataset_name data_path data_files train_file train_dataset",
    "data.eval": "eval_dataset test_dataset eval_file validation_file val_file",
    "data.config": "dataset_config dataset_config_name subset",
    "data.train_split": "split dataset_split",
    "data.train_size": "num_samples max_samples n_train",
    "data.streaming": "dataset_streaming stream",
    "data.shuffle_buffer": "shuffle_buffer_size buffer_size",
    "data.prompt": "prompt_column input_column question_column",
    "data.answer": "answer_column target_column output_column",
    "data.completion": "response response_column completion_column",
    "data.text": "dataset_text_field text_column text_field",
    "data.messages": "conversations messages_column",
    "data.system": "system_prompt system_message",
    "data.template": "prompt_template",
    "data.chat_template_kwargs.enable_thinking": "enable_thinking",
    "model": "model_name model_name_or_path base_model model_id model_path",
    "adapter": "adapter_path peft_model lora_path sft_model_path",
    "ppo.critic": "value_model",
    "algorithm": "algo method trainer stage",
    "rewards": (
        "reward reward_func reward_funcs reward_function reward_functions reward_weights reward_model_path "
        "multi_objective_aggregation"
    ),
    "hardware.quantization": "load_in_4bit load_in_8bit quant bits quantization_config bnb_config",
    "hardware.compute_dtype": "dtype torch_dtype precision bf16 fp16",
    "hardware.optim": "optimizer optim_type",
    "hardware.device": "gpu gpus cuda",
    "hardware.vram": "memory max_memory gpu_memory",
    "sft.completion_only_loss sft.learn": "train_on_inputs assistant_only_loss train_on_responses_only",
}
ALIASES = {name: tuple(keys.split()) for keys, names in _ALSO.items() for name in names.split()}

ELSEWHERE: dict[str, str] = {
    **{key: said for key, said in DECIDED.items() if key not in ALIASES},
    **dict.fromkeys(("output", "out", "output_path", "save_dir", "run_dir"), DECIDED["output_dir"]),
    **dict.fromkeys(("resume", "resume_from_checkpoint"), "give --resume"),
    **dict.fromkeys(("lora_dropout", "dropout"), DECIDED["disable_dropout"]),
    **dict.fromkeys(("logging_steps", "log_every", "log_interval"), "every step is logged"),
    **dict.fromkeys(("packing", "pack"), "examples are always packed"),
    **dict.fromkeys(("use_peft", "use_lora"), "an adapter is always trained; see lora"),
    **dict.fromkeys(("deepspeed", "fsdp"), _SEVERAL),
    **dict.fromkeys(("use_vllm", "vllm", "vllm_mode", "fast_inference", "rollout"), _VLLM),
    **dict.fromkeys(("tools", "environment_factory"), _TOOLS),
    "run_name": DECIDED["output_dir"],
}

# keys of peft's LoraConfig that an adapter on a shared base cannot have, and why
ADAPTERS: dict[str, str] = {
    "modules_to_save": "a whole weight, such as the head, is not trained beside adapters: it would be a second copy, "
    "16 bytes a number, of what all roles share, and what is frozen would no longer be the base",
    "use_dora": "DoRA scales the rows of whole weights to lengths of their own, which is no product of low rank: "
    "layers would keep half as much again, and adapters of two roles do not add up (docs/adapters.md has the numbers)",
    "bias": "the base's biases stay frozen: all roles share them",
    "init_lora_weights": "an adapter starts at zero; a start such as PiSSA's changes the base's weights, which all "
    "roles share",
    "layers_pattern": "layers_to_transform counts the first number in a module's name",
    "exclude_modules": "name what is adapted in target_modules; a regular expression can leave modules out",
}


def suggestion(where: list[str | int], allowed: list[str], schema: type[BaseModel]) -> str:
    """Return what may have been meant by an unknown key, with the full dotted key where it lies elsewhere.

    Args:
        where: the key's place.
        allowed: the keys that are known there.
        schema: the whole; names of other programs are known for a recipe alone.
    """
    name = str(where[-1])
    near = did_you_mean(name, allowed)
    if "training" not in schema.model_fields:
        return near
    folded = name.casefold().replace("-", "_")
    if folded in {one.casefold() for one in allowed}:
        return near
    keys = _dotted_keys(schema)
    if meant := ALIASES.get(folded) or tuple(key for key in keys if key.rsplit(".", 1)[-1] == folded):
        return _mean(meant)
    if folded in ADAPTERS:
        return f"; {ADAPTERS[folded]}"
    if near:
        return near
    if folded in ELSEWHERE:
        return f"; {ELSEWHERE[folded]}"
    close = difflib.get_close_matches(folded, [key.rsplit(".", 1)[-1] for key in keys], n=1, cutoff=0.8)
    return _mean(tuple(key for key in keys if key.rsplit(".", 1)[-1] in close)) if close else ""


def _mean(keys: tuple[str, ...]) -> str:
    return f"; did you mean {' or '.join(repr(key) for key in keys)}?"


def _dotted_keys(schema: type[BaseModel]) -> list[str]:
    """Return the keys of a recipe and of its sections, dotted."""
    keys = list(schema.model_fields)
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{name}.{key}" for key in field.annotation.model_fields]
    return keys
