"""Names of TRL, LLaMA-Factory, and alignment-handbook, and what they are called here.

Key names are those of TRL's DPOConfig, CPOConfig, KTOConfig, ModelConfig, and ScriptArguments, of
LLaMA-Factory's training YAML, and of the handbook's recipes.
"""

from __future__ import annotations

# their key: ours, where the value is the same
SAME = {
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "adam_epsilon": "optim.eps",
    "seed": "seed",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "torch_compile": "train.compile",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "save_total_limit": "checkpoint.keep",
    "output_dir": "hydra.run.dir",
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "adapter_name_or_path": "adapter.path",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "ref_model": "reference.path",
    "ref_model_mixup_alpha": "reference.mixup",
    "dataset_name": "data.path",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "dataset_streaming": "data.streaming",
    "streaming": "data.streaming",
    "max_samples": "data.max_examples",
    "max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "dataset_num_proc": "data.workers",
    "preprocessing_num_workers": "data.workers",
    "group_by_length": "data.group_by_length",
    "label_smoothing": "objective.epsilon",
    "dpo_label_smoothing": "objective.epsilon",
    "rpo_alpha": "objective.nll_coef",
    "pref_ftx": "objective.nll_coef",
    "sft_weight": "objective.nll_coef",
    "simpo_gamma": "objective.gamma",
    "desirable_weight": "objective.lambda_chosen",
    "undesirable_weight": "objective.lambda_rejected",
    "kto_chosen_weight": "objective.lambda_chosen",
    "kto_rejected_weight": "objective.lambda_rejected",
    "ld_alpha": "objective.length_alpha",
    "alpha": "objective.alpha",
}
LOSSES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_mean",
    "hinge": "hinge",
    "ipo": "ipo",
    "robust": "robust",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "aot_pair": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "apo_zero_unpaired": "apo_zero_unpaired",
    "discopop": "discopop",
    "sft": "sft",
    "simpo": "simpo",
    "alphapo": "alphapo",
    "orpo": "orpo",
    "kto": "kto",
    "kto_pair": "kto",
}
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine_with_min_lr",
    "warmup_stable_decay": "wsd",
}
OPTIMIZERS = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw") | {
    "sgd": "sgd",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}
ATTENTION = {
    "fa2": "flash_attention_2",
    "flash_attention_2": "flash_attention_2",
    "sdpa": "sdpa",
    "eager": "eager",
}
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
INTERVALS = {"logging_steps": "log.every", "eval_steps": "eval.every", "save_steps": "checkpoint.every"}
STRATEGIES = {
    "logging_strategy": "log.every",
    "eval_strategy": "eval.every",
    "evaluation_strategy": "eval.every",
    "save_strategy": "checkpoint.every",
}
# where to look for a key that is converted by more than its name
PLACES = {
    **dict.fromkeys(("loss_type", "pref_loss", "stage"), "objective"),
    "pref_beta": "objective.beta",
    "gamma_beta_ratio": "objective.gamma",
    "loss_weights": "objective.parts",
    "cpo_alpha": "objective.nll_coef",
    "f_divergence_type": "objective.divergence",
    "f_alpha_divergence_coef": "objective.divergence_alpha",
    "use_weighting": "objective.weighting=wpo",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler_kwargs": "optim.min_lr_ratio",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "gradient_accumulation_steps": "train.batch_size (the pairs of a step, over all processes)",
    "num_train_epochs": "train.epochs",
    "bf16": "train.dtype=bf16",
    "fp16": "train.dtype=fp16",
    "attn_implementation": "model.attention",
    "flash_attn": "model.attention",
    "use_peft": "adapter=lora",
    "finetuning_type": "adapter=lora",
    "load_in_4bit": "adapter=qlora",
    "quantization_bit": "adapter=qlora",
    "lora_target_modules": "adapter.target_modules",
    "lora_target": "adapter.target_modules",
    "dataset_mixer": "data.sources",
    "dataset_splits": "data.split",
    "val_size": "data.eval_fraction",
    "truncation_mode": "data.truncation",
    "precompute_ref_log_probs": "reference.mode",
    "sync_ref_model": "reference.sync_every",
    "ref_model_sync_steps": "reference.sync_every",
    "report_to": "tracking",
    **INTERVALS,
    **STRATEGIES,
}
HINTS = {
    "lora_dropout": "adapters have no dropout",
    "load_in_8bit": "rcpo holds frozen weights in 4 bits: adapter=qlora",
    "peft_config": "adapter=lora has adapter.r, adapter.alpha, and adapter.target_modules",
    "dtype": "train.dtype is the precision of training",
    "torch_dtype": "train.dtype is the precision of training",
    "disable_dropout": "rcpo always turns dropout off",
    "reference_free": "choose an objective without a reference, such as simpo, cpo, or orpo",
    "max_completion_length": "data.max_length cuts responses",
    "discopop_tau": "objective=discopop uses the published 0.05",
    "use_flash_attention_2": "give model.attention=flash_attention_2",
    "data_seed": "seed decides about the order of the data too",
    "load_best_model_at_end": "see checkpoint.best",
    "metric_for_best_model": "see checkpoint.best",
    "deepspeed": "choose engine=zero0 to zero3_offload",
    "fsdp": "choose engine=zero3",
    "ddp_timeout": "see launch.timeout_minutes",
    "use_liger_kernel": "rcpo never holds all logits at once",
    "padding_free": "data.layout and data.group_by_length save padding",
    "tokenizer_name_or_path": "rcpo takes the model's tokenizer",
    "datasets": "give data.sources",
    "test_split_size": "give data.eval_fraction",
    "template": "rcpo takes the tokenizer's template; see data.template",
    "chat_template": "rcpo takes the tokenizer's template; see data.template",
    "dataset": "name the file: data=pairs data.path=FILE",
    "push_to_hub": "afterwards: rcpo push run=DIR repo=OWNER/NAME",
    "hub_model_id": "afterwards: rcpo push run=DIR repo=OWNER/NAME",
    "run_name": "see tracking and wandb.name",
    "resume_from_checkpoint": "resume=auto continues in hydra.run.dir",
}
NUMBERS = {
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("adam_beta1", "adam_beta2", "ref_model_sync_steps", "gamma_beta_ratio", "beta", "pref_beta"),
    *("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_ratio", "warmup_steps"),
    *("label_smoothing", "val_size", "cpo_alpha", "alpha", "f_alpha_divergence_coef", *INTERVALS),
}
SWITCHES = {
    *("bf16", "fp16", "precompute_ref_log_probs", "use_peft", "load_in_4bit", "sync_ref_model"),
    "use_weighting",
}
UNLIMITED = {"max_length", "max_prompt_length"}  # null is a value of these
# what rcpo decides itself, or always does
SILENT = {
    "do_train",
    "do_eval",
    "overwrite_output_dir",
    "overwrite_cache",
    "remove_unused_columns",
    "log_level",
}
ALWAYS = {"disable_dropout"}  # switches that rcpo cannot turn off; it lacks those that it does not know


def counterpart(name: str) -> str | None:
    """The end of a message about a key of theirs that was given as ours; None for any other name."""
    ours = SAME.get(name) or PLACES.get(name)
    return f"did you mean {ours}?" if ours else HINTS.get(name)
