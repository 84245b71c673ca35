"""The configuration as dataclasses: one attribute for each key that a user may set.

The defaults repeat those of `conf/` (a test holds the two together), so a `RunConfig()` made in Python is the
run that `rcpo train` starts. `conf/` documents the origin of each default. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rcpo.config.data import DataConfig
from rcpo.config.fields import key
from rcpo.config.judge import JudgeConfig
from rcpo.errors import ConfigError

LARGEST_MICRO_BATCH = 16  # that is chosen without being asked: it fits small models, and large ones are told
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_min_lr", "wsd")
BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")  # optimizers of that package
REDUCTIONS = ("sum", "mean", "importance", "average")
# the held-out means that an evaluation while training may have
BEST_METRICS = (
    *("eval/loss", "eval/rewards/chosen", "eval/rewards/rejected", "eval/rewards/margins"),
    *("eval/rewards/accuracies", "eval/logps/chosen", "eval/logps/rejected", "eval/logps/accuracies"),
    *("eval/logratios/chosen", "eval/logratios/rejected", "eval/winner_fell", "eval/exact_match"),
    *("eval/token_logps/chosen", "eval/token_logratios/chosen", "eval/token_logratios/rejected"),
)


@dataclass(kw_only=True)
class TrainConfig:
    """How long to train, on how many pairs at a time, and in which precision."""

    epochs: int = key(1, "passes over the training pairs", at_least=1)
    max_steps: int | None = key(None, "optimizer steps, instead of epochs", at_least=1)
    batch_size: int = key(32, "pairs in an optimizer step, over all processes", at_least=1)
    micro_batch_size: int | None = key(
        None,
        "pairs per process and forward pass; null: the largest divisor up to 16 of its share",
        at_least=1,
    )
    dtype: str = key("fp32", "precision of weights and activations", choices=("fp32", "bf16", "fp16"))
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory")
    compile: bool = key(False, "compile each decoder layer: faster steps after a slow first one")
    max_grad_norm: float | None = key(1.0, "clip the gradient's norm; null: do not", above=0)
    on_nonfinite: str = key(
        "stop", "what to do when a loss or gradient is not finite", choices=("stop", "skip")
    )
    max_nonfinite: int = key(10, "skipped steps in a row that end the run all the same", at_least=1)

    def microbatch(self, world_size: int) -> int:
        """Pairs that each of `world_size` ranks takes at a time: as given, or the largest divisor up to 16.

        Raises ConfigError where the global batch cannot be dealt to the ranks.
        """
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        share, left = divmod(self.batch_size, world_size)
        if left:
            raise ConfigError(
                f"train.batch_size={self.batch_size} is not a multiple of {world_size} process(es); change "
                f"one of the two, for example train.batch_size={(share + 1) * world_size}"
            )
        return max(size for size in range(1, min(share, LARGEST_MICRO_BATCH) + 1) if share % size == 0)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` ranks adds up in an optimizer step.

        Raises ConfigError where the global batch does not divide.
        """
        unit = self.microbatch(world_size) * world_size
        if self.batch_size % unit:
            raise ConfigError(
                f"train.batch_size={self.batch_size} is not a multiple of train.micro_batch_size="
                f"{self.micro_batch_size} times {world_size} process(es); change one of the three, "
                f"for example train.batch_size={(self.batch_size // unit + 1) * unit}"
            )
        return self.batch_size // unit


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = key("adamw", "optimizer", choices=("adamw", "sgd", *BITSANDBYTES))
    lr: float = key(1e-4, "learning rate, the highest of the schedule", above=0)
    weight_decay: float = key(0.0, "decoupled weight decay; norms and biases are exempt", at_least=0)
    betas: list[float] = key([0.9, 0.999], "AdamW's decay of both moments", at_least=0, below=1)
    eps: float = key(1e-8, "AdamW's ε", above=0)
    momentum: float = key(0.0, "momentum of SGD", at_least=0, below=1)
    no_decay: list[str] = key([], "also exempt weights whose names match: [embed_tokens, 'lora_.*']")
    schedule: str = key("constant", "how the learning rate changes after warm-up", choices=SCHEDULES)
    min_lr_ratio: float = key(
        0.0, "lowest rate of cosine_with_min_lr and wsd, as a share of lr", at_least=0, below=1
    )
    decay_ratio: float = key(0.1, "share of all steps over which wsd decays, rounded up", above=0, at_most=1)
    decay_shape: str = key("cosine", "how wsd decays", choices=("linear", "cosine", "1-sqrt"))
    warmup_steps: int = key(0, "steps that warm up; give it, or warmup_ratio", at_least=0)
    warmup_ratio: float = key(0.0, "share of all steps that warm up, rounded up", at_least=0, at_most=1)

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up in a run of `total_steps`; raises ConfigError where the run is too short."""
        steps = self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)
        decay = self.decay(total_steps) if self.schedule == "wsd" else 0
        if steps + decay > total_steps:
            tail = f" and the decay of {decay} (optim.decay_ratio={self.decay_ratio:g})" if decay else ""
            raise ConfigError(
                f"optim.warmup_steps={steps}{tail} do not fit a run of {total_steps} steps; give fewer, or "
                "optim.warmup_ratio"
            )
        return steps

    def decay(self, total_steps: int) -> int:
        """Steps over which wsd decays."""
        return math.ceil(self.decay_ratio * total_steps)


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The objective, by its name in the registry. Its hyper-parameters are the other keys of its YAML."""

    name: str = key("dpo", "name in the registry of objectives")
    module: str | None = key(None, "Python module to import first, which registers an objective of yours")
    reduction: str | None = key(
        "sum", "how token log-probs become the pair's z; null: the objective's own", choices=REDUCTIONS
    )
    nll_coef: float = key(0.0, "adds −coef · mean log-prob of the chosen response", at_least=0)
    weighting: str | None = key(
        None, "wpo: weight pairs by the policy's own likelihood of both responses", choices=("wpo",)
    )
    length_alpha: float = key(
        1.0, "weight of tokens beyond the shorter response of a pair (LD-DPO)", at_least=0, at_most=1
    )
    optional: list[str] = key([], "hyper-parameters to leave out where the objective lacks them, for presets")
    hyperparameters: dict[str, Any] = field(
        default_factory=lambda: {
            "beta": 0.1,
            "epsilon": 0.0,
            "divergence": "reverse_kl",
            "divergence_alpha": 0.5,
        }
    )


@dataclass(kw_only=True)
class ControlConfig:
    """Held-out pairs that `rc=loop` reads where training pairs are not fresh."""

    pairs: int = key(256, "pairs set aside from the training data, at most a tenth of it", at_least=8)
    every: int = key(4, "steps between scoring half a batch of them", at_least=1)


@dataclass(kw_only=True)
class CalibrationConfig:
    """Reward calibration, and the geometry that it and the logged dynamics rest on."""

    enabled: bool = key(False, "rescale the gradients of both responses; false: only measure")
    rule: str = key(
        "center",
        "how α follows: the band's center, its nearest edge, the closed loop, or fixed",
        choices=("center", "edge", "loop", "fixed"),
    )
    band: str = key("batch", "the batch's own band, or the one across samples", choices=("batch", "samples"))
    scope: str = key("batch", "one α per batch, or one per pair", choices=("batch", "pair"))
    alpha: float | None = key(None, "the weight of rule=fixed", above=0)
    target: float = key(0.0, "nats per token at which rule=loop keeps the winner")
    signal: str = key(
        "auto",
        "what rule=loop reads: fresh training pairs, or control pairs",
        choices=("auto", "fresh", "control"),
    )
    control: ControlConfig = field(default_factory=ControlConfig)
    update: str = key(
        "step", "update the averages per optimizer step, or per micro-batch", choices=("step", "microbatch")
    )
    ema: float | None = key(
        None, "decay of the averages; null: 0.9 per step, 0.98 per micro-batch", at_least=0, below=1
    )
    alpha_max: float | None = key(10.0, "clamp α to [1/alpha_max, alpha_max]; null: do not", at_least=1)
    geometry: str = key(
        "head", "norms of the output head's gradient, or of the whole one", choices=("head", "parameters")
    )
    sketch: int | None = key(2048, "rows of the vocabulary sketch; null: exact norms", at_least=1)
    sketch_seed: int = key(0, "seed of the sketch's signs", at_least=0, at_most=2**32 - 1)

    @property
    def decay(self) -> float:
        """The averages' decay: `ema`, or 0.9 per optimizer step and the published 0.98 per micro-batch."""
        if self.ema is not None:
            return self.ema
        return 0.9 if self.update == "step" else 0.98

    @property
    def loops(self) -> bool:
        """Whether α follows from the movement of fresh pairs."""
        return self.enabled and self.rule == "loop"


@dataclass(kw_only=True)
class DynamicsConfig:
    """How often to measure the dynamics with `rc=off`; with `rc=on` every step is measured."""

    every: int = key(1, "steps between measurements with rc=off; 0: never", at_least=0)


@dataclass(kw_only=True)
class LogConfig:
    """How often to log."""

    every: int = key(1, "optimizer steps between rows of metrics.jsonl", at_least=1)


@dataclass(kw_only=True)
class WatchConfig:
    """Divergence warnings, issued once each; training is unaffected."""

    winner: float | None = key(
        0.3, "warn when the winner has lost so many nats per token; null: never", above=0
    )
    patience: int = key(
        50, "warn after so many steps of certain pairs with a growing margin, or of a clamped α", at_least=1
    )


@dataclass(kw_only=True)
class ModelConfig:
    """The policy to train."""

    name: str = key("tiny", "what messages call the model")
    path: str | None = key(
        None, "folder in the hub's format, or OWNER/NAME on the hub; null: the packaged tiny", path=True
    )
    revision: str | None = key(None, "branch, tag, or commit of the hub; null: main")
    init: str = key("pretrained", "pretrained or fresh random weights", choices=("pretrained", "random"))
    attention: str | None = key(
        None,
        "attention implementation; null: the choice of transformers",
        choices=("eager", "sdpa", "flash_attention_2", "flex_attention"),
    )
    trust_remote_code: bool = key(False, "run the Python code of the model's repository")
    allow_pickle: bool = key(False, "read *.bin weights, which can run any program")


@dataclass(kw_only=True)
class AdapterConfig:
    """What to train: all weights, or low-rank adapters on frozen ones."""

    name: str = key("none", "all weights, or low-rank adapters", choices=("none", "lora"))
    r: int = key(8, "rank", at_least=1)
    alpha: int = key(16, "the adapter's output is scaled by alpha / r", at_least=1)
    target_modules: list[str] = key(["all-linear"], "names of the layers to adapt, or all-linear")
    path: str | None = key(None, "adapter to continue training, or with merge=true to merge first", path=True)
    merge: bool = key(False, "merge adapter.path into the weights, then train new adapters")
    quantization: str | None = key(None, "hold the frozen weights in 4 bits", choices=("nf4",))
    save_merged: bool = key(False, "also write the merged model to final/merged")


@dataclass(kw_only=True)
class ReferenceConfig:
    """The reference policy."""

    path: str | None = key(None, "folder or OWNER/NAME on the hub; null: the starting policy", path=True)
    mode: str = key(
        "precompute",
        "compute log-probs before step 1, or hold a frozen model",
        choices=("model", "precompute"),
    )
    sync_every: int = key(0, "steps between moves towards the policy (TR-DPO); 0: never", at_least=0)
    mixup: float = key(0.6, "share of the way that each move goes", above=0, at_most=1)
    cache: str | None = key(None, "folder that keeps log-probs; null: the user's cache; off: none", path=True)
    cache_any_device: bool = key(False, "accept log-probs that another GPU model computed")
    track: bool | None = key(
        None, "compare with the reference where the objective needs none; null: 256 held-out pairs"
    )

    @property
    def keeps(self) -> bool:
        """Whether computed log-probs are kept; YAML reads an unquoted off as false."""
        return self.cache is None or self.cache.lower() not in ("off", "false")


@dataclass(kw_only=True)
class EngineConfig:
    """DeepSpeed: ZeRO stage, and what it keeps in the host's memory."""

    stage: int = key(0, "ZeRO stage", at_least=0, at_most=3)
    offload_optimizer: bool = key(False, "keep the optimizer's state on the host")
    offload_parameters: bool = key(False, "keep the parameters on the host (stage 3)")
    deepspeed: dict[str, Any] = key({}, "DeepSpeed's own settings, merged into those that rcpo makes")


@dataclass(kw_only=True)
class LaunchConfig:
    """Processes on this machine; the count of an outer launcher takes precedence."""

    processes: int = key(1, "processes to start on this machine", at_least=1)
    deterministic: bool = key(False, "use deterministic kernels, where a GPU has slower ones")
    timeout_minutes: float = key(30.0, "end the run when a rank waits longer for another", above=0)
    lost_after: float = key(60.0, "end the run after so many seconds of silence from a rank", above=0)
    meeting_seconds: float = key(50.0, "seconds in which all ranks have to come at the start", above=0)


@dataclass(kw_only=True)
class EvalConfig:
    """Held-out evaluation, while training and at its end."""

    every: int = key(0, "optimizer steps between evaluations; 0: only at the end", at_least=0)
    batch_size: int = key(64, "pairs per process and forward pass", at_least=1)
    max_examples: int | None = key(None, "held-out pairs; null: all", at_least=1)
    generate_examples: int | None = key(
        256, "prompts to answer greedily where answers can be checked; null: all", at_least=0
    )
    max_new_tokens: int | None = key(
        None, "tokens of an answer; null: those of the longest chosen response, at most 512", at_least=1
    )
    scorer: str | None = key(
        None, "how to check an answer; null: as the data's task does", choices=("number", "text", "pattern")
    )
    answer_pattern: str | None = key(None, "regular expression of scorer=pattern, whose first group counts")
    kl_examples: int = key(128, "prompts to answer for the KL to a reference held as a model", at_least=0)
    checkpoints: str = key("final", "weights that rcpo evaluate takes", choices=("final", "all"))
    parameters_geometry: bool = key(False, "rcpo evaluate: also the dynamics by the true gradient")
    preferences: bool = key(True, "rcpo evaluate: the held-out pairs")
    tasks: list[str] = key([], "rcpo evaluate: tasks of lm-evaluation-harness, NAME, NAME@SHOTS, or a file")
    limit: int | None = key(None, "documents of each task; null: all", at_least=1)
    task_batch_size: int = key(8, "requests per process and forward pass", at_least=1)
    chat_template: bool = key(False, "put a task's questions into the tokenizer's chat template")
    judge: bool = key(False, "rcpo evaluate: let another model compare answers, see judge.*")


@dataclass(kw_only=True)
class ProbeConfig:
    """Held-out examples that are followed one by one through training."""

    size: int = key(16, "examples to follow; 0: none", at_least=0)
    every: int = key(25, "steps between their log-probs", at_least=1)
    generate_every: int = key(200, "steps between their answers, a multiple of every; 0: never", at_least=0)
    samples: int = key(4, "prompts whose answers are shown", at_least=0)


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to write checkpoints, and which to keep. A signal that stops the run writes one too."""

    every: int = key(0, "optimizer steps between checkpoints; 0: by time alone", at_least=0)
    minutes: float = key(10.0, "minutes between checkpoints; 0: never", at_least=0)
    keep: int = key(2, "newest checkpoints to keep", at_least=1)
    best: str | None = key(None, "held-out metric whose best checkpoint stays too", choices=BEST_METRICS)
    best_mode: str = key("max", "whether higher or lower is better", choices=("max", "min"))
    background: bool | None = key(
        None, "write while training continues; null: unless the optimizer is offloaded"
    )


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases; `name` and `group` are those of every tracker."""

    mode: str = key(
        "offline",
        "upload, write a folder for `wandb sync`, or neither",
        choices=("online", "offline", "disabled"),
    )
    project: str = key("rcpo", "name of the project")
    entity: str | None = key(None, "team or user that owns the project; null: the account's own")
    group: str | None = key(None, "group of the run, in every tracker; null: the folder of its sweep, if any")
    name: str | None = key(None, "name of the run, in every tracker; null: that of its folder")
    tags: list[str] = key([], "tags of the run")
    notes: str | None = key(None, "notes on the run")
    job_type: str | None = key(None, "kind of the run, such as train")


@dataclass(kw_only=True)
class MlflowConfig:
    """A server or database of MLflow."""

    uri: str | None = key(
        None, "address of the server or database; null: MLFLOW_TRACKING_URI, else mlflow's own default"
    )
    experiment: str = key("rcpo", "name of the experiment")


@dataclass(kw_only=True)
class TrackioConfig:
    """The database of Trackio."""

    project: str = key("rcpo", "name of the project")


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    seed: int = key(1, "seed of data order, initialization, and sketches", at_least=0, at_most=2**32 - 1)
    resume: str | None = key(
        None, "null: a fresh run; auto: continue in hydra.run.dir; a folder: continue that run", path=True
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rc: CalibrationConfig = field(default_factory=CalibrationConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    resume_changed: str = key(
        "refuse", "continue a run whose configuration or data differ", choices=("refuse", "allow")
    )
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: list[str] = key(
        ["wandb"],
        "trackers that get the rows of metrics.jsonl: one, or a list",
        choices=("wandb", "tensorboard", "mlflow", "trackio", "none"),
    )
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    trackio: TrackioConfig = field(default_factory=TrackioConfig)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that trains: without fp32 weights, stage 0 runs as stage 1.

        DeepSpeed's own stage 0 in fp16 applies no loss scale, and in bf16 it cannot add up gradients in fp32.
        """
        return self.engine.stage if self.train.dtype == "fp32" else max(1, self.engine.stage)

    @property
    def saves_in_background(self) -> bool:
        """Whether training goes on while a checkpoint is written, from a copy in the host's memory."""
        given = self.checkpoint.background
        return not self.engine.offload_optimizer if given is None else given

    def groups_by_length(self, couples_batch: bool) -> bool:
        """Whether a step's pairs are dealt to micro-batches by length, so that little is padded.

        Left alone, this is off where a micro-batch's company changes the result: objectives that couple its
        pairs, and a calibration that goes by micro-batches, which would see a step's longest pairs first.
        """
        if self.data.group_by_length is not None:
            return self.data.group_by_length
        return not (couples_batch or (self.rc.enabled and self.rc.update == "microbatch"))
