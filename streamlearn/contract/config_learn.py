"""The learner's part of the configuration: model, objective, optimizer, rate, training.  contract/config.py holds the whole."""

from typing import Literal, Self

from pydantic import Field, model_validator

from streamlearn.contract.section import Fraction, Section


class ModelConfig(Section):
    """Trunk and projection head."""

    backbone: str = "regnety-400mf"  # learn.backbones knows the names
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3 stride 1, for images of 32-64 px
    head: tuple[int, ...] = (2048, 128)  # hidden widths, then the embedding's
    head_norm: Literal["bn", "none"] = "bn"  # between the head's layers
    norm: Literal["bn", "gn_ws"] = "bn"  # of the trunk; gn_ws: GroupNorm and standardised weights (learn/backbones/norms.py)


class ObjectiveConfig(Section):
    """SwAV."""

    kind: Literal["swav"] = "swav"  # the objective
    prototypes: int = Field(default=3000, ge=2)  # K; about ten times the concepts, at most batch + queue
    temperature: float = Field(default=0.1, gt=0)  # of the predictions
    epsilon: float = Field(default=0.05, ge=0.005)  # of the assignments; 0.01-0.015 for batches of about 128
    sinkhorn_iterations: int = Field(default=3, ge=1)  # SEER: 10
    hard_steps: int = Field(default=0, ge=0)  # at the beginning, in which codes are one-hot (VISSL's temp_hard_assignment_iters)
    queue: int = Field(default=0, ge=0)  # embeddings kept of past batches; for batches under ~1024
    queue_start: int = Field(default=0, ge=0)  # step at which the queue is first used
    freeze_prototypes: int = Field(default=313, ge=0)  # steps at the beginning
    assign_ranks: int = Field(default=0, ge=0)  # neighbouring processes that assign together; 0: all of them


class OptimConfig(Section):
    """The optimizer."""

    kind: Literal["lars", "sgd", "adamw"] = "lars"  # lars for large batches, sgd for small ones
    lr: float = Field(default=0.3, gt=0)  # after warm-up, for a batch of lr_batch images
    lr_batch: int = Field(default=0, ge=0)  # then scaled linearly to train.batch; 0: lr is for train.batch as it is
    warmup_steps: int = Field(default=500, ge=0)  # linear, once
    warmup_start: Fraction = 0.0  # share of the rate at which the warm-up begins
    momentum: float = Field(default=0.9, ge=0, lt=1)  # without Nesterov; adamw: its first beta
    second_beta: float = Field(default=0.999, ge=0, lt=1)  # adamw
    weight_decay: float = Field(default=1e-6, ge=0)  # of every parameter, as SwAV has it, but for those left out by `exclude`
    exclude: tuple[Literal["bias", "norm"], ...] = ()  # left out of weight decay and of LARS; norm: weights and biases of normalisation
    trust: float = Field(default=0.001, gt=0)  # lars

    def for_batch(self, batch: int) -> Self:
        """The same with `lr` as it is for `batch` images: Goyal et al.'s linear rule (arXiv:1706.02677), as VISSL's auto_lr_scaling."""
        return self.model_copy(update={"lr": self.lr * batch / self.lr_batch, "lr_batch": 0}) if self.lr_batch else self


class PlateauConfig(Section):
    """Halve the rate when a plateau is proved (docs/learning-rate.md)."""

    block_steps: int = Field(default=50, ge=1)  # losses in one trimmed block mean
    min_blocks: int = Field(default=24, ge=4)  # in the window before it is judged
    horizon_blocks: int = Field(default=48, ge=1)  # the gain is judged over this many blocks ahead
    delta: float = Field(default=0.003, gt=0)  # relative gain per horizon that is too small to wait for
    looks: int = Field(default=2, ge=1)  # consecutive looks that must agree
    cycle_steps: int = Field(default=0, ge=0)  # steps in a cycle of the content that is known of, such as a day; 0: none
    probe: str = "auto"  # a name of [[probe.banks]], whose error must be flat too; auto: the first, if there is one; none: the loss alone
    probe_delta: float = Field(default=0.005, gt=0)  # relative gain in error per horizon that is too small to wait for
    floor: float = Field(default=1 / 64, gt=0, le=1)  # of the base rate


class TrainConfig(Section):
    """The learner."""

    seed: int = 0  # of the initial weights
    init: str = ""  # a file of weights, such as a public SEER checkpoint, or a tag of this home's registry; empty: random weights
    init_parts: Literal["trunk", "all"] = "trunk"  # of that file; all: projection head and prototypes too
    batch: int = Field(default=64, ge=2)  # images in a step
    micro_batch: int = Field(default=0, ge=0)  # images of one process in one forward and backward pass (learn/accumulate.py); 0: all
    threads: int = Field(default=0, ge=0)  # torch CPU threads; 0: torch's own choice
    device: str = "cpu"  # as torch names it; of several processes each takes its own GPU of "cuda"
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes (docs/scale.md), each has the whole model, or a part of every tensor
    sync_bn_group: int = Field(
        default=0, ge=0
    )  # neighbouring processes that share BatchNorm's statistics; 0, or more than there are: all; 1: none
    ranks_timeout_s: float = Field(default=1800.0, gt=0)  # a process that the others wait for so long is lost, and all end
    precision: Literal["float32", "bfloat16"] = "float32"  # of trunk and head; weights, statistics, prototypes and loss stay float32
    recompute: Literal["none", "selective", "full"] = (
        "none"  # what is made again in the backward pass, not kept: norms and ReLUs, or whole blocks
    )
    kernels: Literal["library", "measured"] = "library"  # measured: each convolution in the form that is fastest here (learn/tuning.py)
    compile: bool = False  # the trunk's blocks through torch.compile
    pad_groups: int = Field(default=0, ge=0)  # group widths are computed as multiples of this; weights keep their shapes; 0: as they are
    optim: OptimConfig = OptimConfig()
    plateau: PlateauConfig = PlateauConfig()
    ema_decay: float = Field(default=0.999, ge=0, lt=1)  # of the average, at least; at first (1 + step) / (10 + step)
    ema_share: Fraction = 0.1  # its horizon, 1 / (1 - decay), of the steps since the rate last changed; 0: ema_decay is all
    ema_decay_most: float = Field(default=0.9999, ge=0, lt=1)  # beyond which it does not grow
    checkpoint_steps: int = Field(default=500, ge=1)  # steps between checkpoints
    keep_checkpoints: int = Field(default=3, ge=1)  # the newest
    snapshot_steps: int = Field(default=2000, ge=1)  # steps between snapshots
    bn_images: int = Field(default=512, ge=2)  # for re-estimating BatchNorm of the published EMA weights
    max_bad_steps: int = Field(default=20, ge=1)  # consecutive non-finite steps skipped before the learner goes back to a checkpoint
    guard_looks: int = Field(default=5, ge=0)  # looks in a row, ten steps apart, at a collapsed model before it does; 0: it only says so
    max_rollbacks: int = Field(default=3, ge=0)  # in a row, before the learner stops
    max_steps: int = Field(default=0, ge=0)  # 0: for ever.  Benchmarks and tests stop somewhere
    name: str = Field(default="streamlearn", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")  # of the model, in registry and card
    license: str = Field(default="Apache-2.0", min_length=1)  # of the published weights, as SPDX has it; likewise
    source: str = ""  # URL of the code, likewise; empty: not said

    @model_validator(mode="after")
    def _whole_parts(self) -> Self:
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch = {self.micro_batch} does not divide batch = {self.batch}: set it to a divisor, or to 0")
        return self
