"""The configuration as dataclasses: one attribute for each key that a user may set.

The defaults repeat those of `conf/` (a test holds the two together), so a `RunConfig()` made in Python is the
run that `rcpo train` starts. Where they come from is said beside them in `conf/`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rcpo.config.data import DataConfig
from rcpo.config.judge import JudgeConfig
from rcpo.errors import ConfigError

LARGEST_MICRO_BATCH = 16  # that is chosen without being asked: it fits small models, and large ones are told


@dataclass(kw_only=True)
class TrainConfig:
    """How long, how many pairs at a time, in which precision.

    `micro_batch_size` None is the largest divisor, up to 16, of a process's share of the batch.
    `on_nonfinite` stop or skip a step whose loss or gradient is not finite, at most `max_nonfinite` in a row.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    dtype: str = "fp32"
    gradient_checkpointing: bool = False
    max_grad_norm: float | None = 1.0
    on_nonfinite: str = "stop"
    max_nonfinite: int = 10

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
    """Optimizer and learning-rate schedule; `betas` and `eps` are adamw's, `momentum` is sgd's."""

    name: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    momentum: float = 0.0
    schedule: str = "constant"
    warmup_ratio: float = 0.0


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The objective by name; `module` is imported before the look-up (a user's own package).

    `reduction` None is the objective's own. `weighting` wpo weights pairs by the policy's own likelihood,
    `length_alpha` below 1 the tokens beyond a pair's shorter response (LD-DPO). `hyperparameters` are the
    keys of its YAML beside the others; those named in `optional` are left out where the objective does not
    have them, for presets that fit any.
    """

    name: str = "dpo"
    module: str | None = None
    reduction: str | None = "sum"
    nll_coef: float = 0.0
    weighting: str | None = None
    length_alpha: float = 1.0
    optional: list[str] = field(default_factory=list)
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
    """Held-out pairs that `rc=loop` reads where training pairs are not fresh (`rc.control.*`).

    `pairs` are set aside from the training data; every `every` steps the policy scores half a batch of them.
    """

    pairs: int = 256
    every: int = 4


@dataclass(kw_only=True)
class CalibrationConfig:
    """Reward calibration and the geometry it and the logged dynamics rest on (`rc.*`).

    `rule` says how α follows: from the `center` or the nearest `edge` of a band, from the closed `loop`, or
    `fixed` at `alpha`. `band` is the batch's own or the one across samples, `scope` one α per batch or pair.
    `target` (nats per token) and `signal` are the loop's.
    """

    enabled: bool = False
    rule: str = "center"
    band: str = "batch"
    scope: str = "batch"
    alpha: float | None = None
    target: float = 0.0
    signal: str = "auto"
    control: ControlConfig = field(default_factory=ControlConfig)
    update: str = "step"
    ema: float | None = None
    alpha_max: float | None = 10.0
    geometry: str = "head"
    sketch: int | None = 2048
    sketch_seed: int = 0

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
    """`every` N steps (0: never) the dynamics are measured with `rc=off`; with `rc=on` they always are."""

    every: int = 1


@dataclass(kw_only=True)
class LogConfig:
    """Every how many optimizer steps a row is written."""

    every: int = 1


@dataclass(kw_only=True)
class WatchConfig:
    """When a run that may be diverging is spoken of, once for each sign; nothing is changed by it.

    `winner` is how many nats a token the winner may lose against the reference (None: any), `patience` the
    steps in a row after which a certain accuracy with a growing margin, or a clamped α, is a sign.
    """

    winner: float | None = 0.3
    patience: int = 50


@dataclass(kw_only=True)
class ModelConfig:
    """The policy: `path` is a folder in the hub's format or a name on the hub, None the packaged `tiny`.

    `attention` None is transformers' choice. `allow_pickle` reads weights that have no safetensors.
    """

    name: str = "tiny"
    path: str | None = None
    revision: str | None = None
    init: str = "pretrained"
    attention: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(kw_only=True)
class AdapterConfig:
    """What is trained: all weights (`none`), or low-rank adapters on frozen ones (`lora`).

    `path` is an adapter to go on training, or with `merge` one to put into the weights before new ones are
    made. `quantization` nf4 keeps the frozen weights in 4 bits. `save_merged` writes final/merged as well.
    """

    name: str = "none"
    r: int = 8
    alpha: int = 16
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    path: str | None = None
    merge: bool = False
    quantization: str | None = None
    save_merged: bool = False


@dataclass(kw_only=True)
class ReferenceConfig:
    """The reference policy: `path` None is the starting policy.

    `cache` is the folder that keeps its log-probs; None is the user's cache folder, `off` keeps none. They
    are kept by GPU model, which decides the last digits, unless `cache_any_device` takes any. Every
    `sync_every` steps (0: never) the reference moves the `mixup` share of the way to the policy (TR-DPO).
    `track` is about objectives that need no reference: true compares all pairs with it, false none, None all
    of the embedded data and 256 held-out pairs of other data, which tell whether the winner fell.
    """

    path: str | None = None
    mode: str = "precompute"
    sync_every: int = 0
    mixup: float = 0.6
    cache: str | None = None
    cache_any_device: bool = False
    track: bool | None = None

    @property
    def keeps(self) -> bool:
        """Whether computed log-probs are kept; YAML reads an unquoted off as false."""
        return self.cache is None or self.cache.lower() not in ("off", "false")


@dataclass(kw_only=True)
class EngineConfig:
    """DeepSpeed: ZeRO stage and what it keeps in the host's memory.

    `deepspeed` is merged into DeepSpeed's own configuration; what other keys decide is refused there.
    """

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class LaunchConfig:
    """`processes` started on this machine; an external launcher's count takes precedence.

    A rank that the others wait for longer than `timeout_minutes` ends the run, and so do `lost_after` seconds
    without a word from a rank. At the start all ranks have to come within `meeting_seconds`.
    """

    processes: int = 1
    deterministic: bool = False
    timeout_minutes: float = 30.0
    lost_after: float = 60.0
    meeting_seconds: float = 50.0


@dataclass(kw_only=True)
class EvalConfig:
    """Held-out evaluation: `every` N steps (0: only at the end), None examples: all of them.

    `tasks` are lm-evaluation-harness's: NAME, NAME@SHOTS or a YAML file, `limit` documents of each (None:
    all), `task_batch_size` requests at a time, by the tokenizer's template with `chat_template`;
    `preferences` false leaves out all that is about pairs; `judge` asks another model (`judge.*`).
    `max_new_tokens` None is the longest chosen response's. `scorer` says how an answer is checked: number,
    text, pattern (`answer_pattern`), None as the data's own task does. `kl_examples` prompts are answered for
    the KL to a reference that is held as a model. `checkpoints` final or all, `parameters_geometry` the
    dynamics by the true gradient too: both of `rcpo evaluate`.
    """

    every: int = 0
    batch_size: int = 64
    max_examples: int | None = None
    generate_examples: int | None = 256
    max_new_tokens: int | None = None
    scorer: str | None = None
    answer_pattern: str | None = None
    kl_examples: int = 128
    checkpoints: str = "final"
    parameters_geometry: bool = False
    preferences: bool = True
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    task_batch_size: int = 8
    chat_template: bool = False
    judge: bool = False


@dataclass(kw_only=True)
class ProbeConfig:
    """`size` examples (0: none) followed through training `every` N steps.

    Every `generate_every` steps (0: never) they are answered too; `samples` of the prompts are shown.
    """

    size: int = 16
    every: int = 25
    generate_every: int = 200
    samples: int = 4


@dataclass(kw_only=True)
class CheckpointConfig:
    """`every` N steps and every `minutes` (0: not), and when a signal stops the run; the last `keep` stay.

    `best` names a held-out metric whose best checkpoint, by `best_mode` max or min, stays too. `background`
    False writes while training waits; None: where the optimizer is offloaded, for want of memory.
    """

    every: int = 0
    minutes: float = 10.0
    keep: int = 2
    best: str | None = None
    best_mode: str = "max"
    background: bool | None = None


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases: online, offline (a folder that `wandb sync` accepts) or disabled."""

    mode: str = "offline"
    project: str = "rcpo"


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    seed: int = 1
    resume: str | None = None
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
    resume_changed: str = "refuse"
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that trains: without fp32 weights, stage 0 runs as stage 1.

        DeepSpeed's own stage 0 in fp16 applies no loss scale, and in bf16 it cannot add up gradients in fp32.
        """
        return self.engine.stage if self.train.dtype == "fp32" else max(1, self.engine.stage)

    def groups_by_length(self, couples_batch: bool) -> bool:
        """Whether a step's pairs are dealt to micro-batches by length, so that little is padded.

        Left alone, this is off where a micro-batch's company changes the result: objectives that couple its
        pairs, and a calibration that goes by micro-batches, which would see a step's longest pairs first.
        """
        if self.data.group_by_length is not None:
            return self.data.group_by_length
        return not (couples_batch or (self.rc.enabled and self.rc.update == "microbatch"))
