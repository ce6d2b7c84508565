"""A run and its parts: every value that a user can set, with its unit, its default and its rules.

This module imports grammar alone and never torch, so that a login node waits for nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from hpc_mm.grammar import ConfigError as ConfigError  # everybody's way to the words of grammar is through here
from hpc_mm.grammar import Part as Part
from hpc_mm.grammar import differences as differences
from hpc_mm.grammar import one_line as one_line
from hpc_mm.grammar import parse_arguments as parse_arguments
from hpc_mm.grammar import unknown as unknown
from hpc_mm.grammar import validated as validated
from hpc_mm.grammar import with_overrides as with_overrides

IMAGE_TOKEN = "<image>"
IMAGE_PLACE = -200  # stands among token ids where an image's features are spliced in (LLaVA)
ENDOFCHUNK_TOKEN = "<|endofchunk|>"
PAD_TOKEN = "<PAD>"
STORE_PREFIX = "store:"  # marks a file that lies in the site's store

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Square = Literal["crop", "pad"]
TORCH_FILES = (".bin", ".pt", ".pth")  # ends of names of files that torch.save wrote
DecayRate = Annotated[float, Field(ge=0, lt=1)]


# ---------------------------------------------------------------- the model


class Vision(Part):
    name: str = Field("ViT-L-14-quickgelu", description="open_clip model, or local-dir:FOLDER, or hf-hub:ID")
    pretrained: str = Field("openai", description="open_clip weights tag or file; empty = random weights")
    architecture: dict[str, Any] = Field(
        {}, description="open_clip vision_cfg of a random tower of your own, in place of name and pretrained"
    )
    tokens: Literal["before_ln_post", "after_ln_post", "penultimate"] = Field(
        "before_ln_post",
        description="patch tokens taken before (released OpenFlamingo weights) or after the last norm, or before the "
        "last layer (LLaVA)",
    )


class Language(Part):
    name: str = Field("", description="transformers hub id or folder of a language model")
    tokenizer: str = Field(
        "", description="hub id, folder, tokenizer.json, or store:PATH of a tokenizer.json; empty = name"
    )
    architecture: dict[str, Any] = Field(
        {}, description="transformers config (with model_type) of a random model of your own, in place of name"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


TrainablePart = Literal["vision", "language", "resampler", "cross_attention", "new_tokens"]


class Flamingo(Part):
    """OpenFlamingo's architecture (arXiv 2308.01390)."""

    FORMS: ClassVar = ("interleaved", "pairs")  # of sources

    family: Literal["flamingo"] = "flamingo"
    vision: Vision = Vision()
    language: Language = Language()
    cross_attn_every_n_layers: Positive = Field(1, description="a gated cross-attention block before every n-th layer")
    resampler_depth: Positive = Field(6, description="layers of the perceiver resampler")
    resampler_latents: Positive = Field(64, description="latents that stand for one image")
    trainable: tuple[TrainablePart, ...] = Field(
        ("resampler", "cross_attention", "new_tokens"), description="parts that learn; the others are frozen"
    )
    weights: str = Field(
        "", description="to start from: OpenFlamingo's checkpoint.pt or its folder, or what export wrote; empty = none"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice to save memory")
    compile: bool = Field(False, description="torch.compile the vision tower and the decoder layers")

    @property
    def holds_what_it_began_with(self) -> bool:
        """Whether a checkpoint holds all that ``weights`` gave; OpenFlamingo's gave token tables, which are frozen."""
        return not self.weights


class Lora(Part):
    """Low-rank updates of the language model's matrices (arXiv 2106.09685), in place of training it whole."""

    rank: int = Field(0, ge=0, description="rank of the updates; 0 = none")
    alpha: Annotated[float, Field(gt=0)] = Field(16, description="they are scaled by alpha / rank")
    dropout: Probability = Field(0.05, description="on what the updates read")


class ClipFlanT5(Part):
    """CLIP-FlanT5: projected image patches among the input embeddings of a T5 encoder-decoder (arXiv 2404.01291)."""

    FORMS: ClassVar = ("chat",)

    family: Literal["clip_flant5"] = "clip_flant5"
    vision: Vision = Field(description="the image tower")
    language: Language = Field(description="the T5 encoder-decoder")
    square: Square = Field("pad", description="pictures become square by padding with the mean colour, or by cutting")
    dropout: Probability = Field(0.1, description="of the language model in training, also where it is frozen")
    lora: Lora = Lora()
    trainable: tuple[Literal["projector", "language"], ...] = Field(
        ("projector", "language"), description="parts that learn; the others are frozen"
    )
    weights: str = Field(
        "", description="to start from: a released folder, an mm_projector.bin, or what export wrote; empty = none"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice to save memory")
    compile: bool = Field(False, description="torch.compile the vision tower and the layers")

    @property
    def holds_what_it_began_with(self) -> bool:
        """Whether a checkpoint holds all that ``weights`` gave, as it does of an mm_projector.bin."""
        return not self.weights or (Path(self.weights).suffix in TORCH_FILES and "projector" in self.trainable)

    @model_validator(mode="after")
    def updates_are_of_what_learns(self) -> ClipFlanT5:
        if self.lora.rank and "language" not in self.trainable:
            raise ValueError(f"lora.rank={self.lora.rank} is of the language model, which is not in trainable")
        return self


# ---------------------------------------------------------------- data

Template = Literal["t5_plain_split_text", "t5_plain", "t5_v1"]


class Source(Part):
    """A stream of samples with its share of each optimizer step."""

    data: str = Field(description="folder of shards: an address, or a name inside the site's store")
    form: Literal["interleaved", "pairs", "chat"] = Field(
        description="documents of text and images, image-caption pairs, or chats (a pair is one without a question)"
    )
    template: Template | None = Field(None, description="of form=chat: how a chat becomes a question and its answer")
    order: Literal["random", "length", "modality_length"] = Field(
        "random",
        description="samples of a step: any, those of like length with or without images, or by LLaVA's "
        "group_by_modality_length",
    )
    chunk: Positive = Field(
        1,
        description="of order=modality_length: samples of a chunk (LLaVA's batch per device), which get equal lengths",
    )
    batch: Positive = Field(description="samples per optimizer step, over all ranks")
    batch_from: dict[Positive, Annotated[int, Field(ge=0)]] = Field(
        {}, description='samples per optimizer step from later steps on, such as {"10000": 256}; 0 = none'
    )
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="multiplier of this source's loss")
    max_tokens: Positive = Field(description="tokens per sample; what is longer is cut on the right")
    max_images: Positive = Field(6, description="images per sample; further ones are left out")
    min_images: int = Field(1, ge=0, description="a document with fewer images that survive cutting is left out")
    drop_single_image: Probability = Field(0.0, description="probability of leaving out a document with one image")
    min_similarity: float | None = Field(None, description="leave out images whose similarity to their text is lower")
    pack_tokens: int = Field(0, ge=0, description="places of a row that holds several samples; 0 = one sample per row")
    pack_images: Positive = Field(24, description="images of a row that holds several samples")
    flip: Probability = Field(0.0, description="probability of mirroring an image (it mirrors text in the image too)")
    shuffle_shards: Positive = Field(16, description="shards whose samples are shuffled together")
    max_unreadable: Probability = Field(0.01, description="share of unreadable samples above which the run stops")

    @model_validator(mode="after")
    def no_value_is_without_effect(self) -> Source:
        of_documents = "" if self.form == "interleaved" else f"form=interleaved, not of form={self.form}"
        wanted = {
            "min_images": of_documents,
            "drop_single_image": of_documents,
            "pack_images": "" if self.pack_tokens else "packed rows, and pack_tokens=0 makes none",
            "chunk": "" if self.order == "modality_length" else f"order=modality_length, not of order={self.order}",
        }
        for name, what in wanted.items():
            value, default = getattr(self, name), Source.model_fields[name].default
            if what and value != default:
                raise ValueError(f"{name}={value} is of {what}: it must be {name}={default}")
        return self

    @model_validator(mode="after")
    def an_order_by_length_is_of_chats(self) -> Source:
        if self.order == "random":
            return self
        if self.form != "chat":
            raise ValueError(f"order={self.order} is of form=chat, not of form={self.form}")
        if self.batch_from:
            raise ValueError(f"order={self.order} keeps one batch: leave batch_from={self.batch_from} out")
        if self.order == "modality_length" and self.batch % self.chunk:
            raise ValueError(f"batch={self.batch} must be a multiple of chunk={self.chunk}")
        return self

    @model_validator(mode="after")
    def chats_have_a_template(self) -> Source:
        if self.form == "chat" and self.template is None:
            raise ValueError(f"form=chat wants a template, one of {', '.join(get_args(Template))}")
        if self.form != "chat" and self.template is not None:
            raise ValueError(f"template={self.template} is for form=chat alone; form={self.form} has none")
        return self

    @model_validator(mode="after")
    def a_sample_fits_a_row(self) -> Source:
        for packed, sample in (("pack_tokens", "max_tokens"), ("pack_images", "max_images")):
            if self.pack_tokens and getattr(self, packed) < getattr(self, sample):
                raise ValueError(f"{packed}={getattr(self, packed)} must be {sample}={getattr(self, sample)} or more")
        return self


class Loader(Part):
    workers: int = Field(4, ge=0, description="reading processes per rank; 0 = read in the training process")
    prefetch: Positive = Field(4, description="micro-batches that each worker reads ahead")
    by_length: bool = Field(False, description="samples of like length share a micro-step, short ones first")
    reads: Positive = Field(16, description="samples read at once per worker")
    cache: str = Field("", description="node-local folder that keeps samples that were read; empty = none")
    cache_gb: Annotated[float, Field(gt=0)] = Field(100.0, description="size limit of the cache folder, GB")


# ---------------------------------------------------------------- training


class Train(Part):
    steps: Positive = Field(description="optimizer steps")
    accumulate: Positive = Field(1, description="micro-steps per optimizer step; batches are divided by it")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup: int = Field(1875, ge=0, description="optimizer steps of linear warm-up")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), description="AdamW's decay rates")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="on matrices of cross-attention and of trained towers; elsewhere 0"
    )
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0 = no clipping")
    seed: int = Field(42, ge=0, description="of weights, data order and everything drawn")
    log_every: Positive = Field(10, description="optimizer steps between lines of metrics.jsonl")
    save_every: Positive = Field(1000, description="optimizer steps between checkpoints")
    keep: Positive = Field(2, description="newest checkpoints that are kept")
    keep_every: int = Field(0, ge=0, description="checkpoints of every so many steps are kept for good; 0 = none")
    max_nonfinite: int = Field(20, ge=0, description="skipped steps with a non-finite loss before the run stops")


class Evaluate(Part):
    """What checkpoints are tried on while training goes on."""

    every: int = Field(
        0,
        ge=0,
        description="optimizer steps between checkpoints that are evaluated, and the last one is; "
        "each is kept until its scores are there; 0 = none",
    )
    benchmarks: dict[str, str] = Field(
        {},
        description="script of eval/, or benchmark of eval/vqascore.py -> its words: "
        'evaluate.benchmarks.coco="data=coco shots=0,4 tasks=4"',
    )


class Tracking(Part):
    wandb: Literal["online", "offline", "off"] = Field("off", description="Weights & Biases beside metrics.jsonl")
    project: str = Field("hpc_mm", description="wandb project")
    entity: str = Field("", description="wandb team or user")


# ---------------------------------------------------------------- the cluster

SLURM_TIME = r"^(\d+|\d+:\d{1,2}|\d+:\d{1,2}:\d{1,2}|\d+-\d{1,2}(:\d{1,2}){0,2})$"


class Slurm(Part):
    """What sbatch is told. Empty = the cluster's own default."""

    partition: str = Field("", description="--partition")
    account: str = Field("", description="--account")
    qos: str = Field("", description="--qos")
    constraint: str = Field("", description="--constraint")
    exclude: str = Field("", description="--exclude, a node list")
    time: str = Field("1-00:00:00", pattern=SLURM_TIME, description="--time: minutes, H:M:S or D-H:M:S")
    cpus_per_task: Positive = Field(8, description="cores per node's task (all of a node's processes share them)")
    memory: str = Field("", pattern=r"^(\d+[KMGT]?)?$", description="--mem per node, such as 400G; 0 = all of it")
    container: str = Field("", description="image that enroot/pyxis runs the job in (srun --container-image)")
    extra: dict[str, str] = Field({}, description="further sbatch directives: slurm.extra.reservation=maintenance")


class Run(Part):
    """Everything that decides a training run. Frozen as run.json in its folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder below HPC_MM_RUNS")
    model: Annotated[Flamingo | ClipFlanT5, Field(discriminator="family")] = Field(description="architecture")
    start: str = Field("", description="run, by name or folder, whose trained weights this one begins with")
    sources: dict[str, Source] = Field(min_length=1, description="what is trained on, by name")
    train: Train = Field(description="optimizer, schedule, seed, checkpoints")
    loader: Loader = Field(Loader(), description="reading")
    evaluate: Evaluate = Field(Evaluate(), description="benchmarks while training goes on")
    tracking: Tracking = Field(Tracking(), description="wandb")
    strategy: str = Field("zero2", description="a file of accelerate_configs/, or a path to your own .yaml")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of activations; master weights are fp32")
    nodes: Positive = Field(1, description="machines")
    gpus_per_node: int = Field(8, ge=0, description="GPUs, and so processes, per node; 0 = one CPU process per node")
    slurm: Slurm = Field(Slurm(), description="what sbatch is told")

    @property
    def processes_per_node(self) -> int:
        return max(self.gpus_per_node, 1)

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    @model_validator(mode="after")
    def every_rank_has_samples(self) -> Run:
        for name, source in self.sources.items():
            if source.batch < self.world_size:
                raise ValueError(
                    f"sources.{name}.batch={source.batch} leaves ranks without samples: {self.nodes} nodes x "
                    f"{self.processes_per_node} processes need {self.world_size} or more"
                )
        return self

    @model_validator(mode="after")
    def what_is_evaluated_is_saved(self) -> Run:
        every, saved = self.evaluate.every, self.train.save_every
        if every % saved:
            raise ValueError(f"evaluate.every={every} must be a multiple of train.save_every={saved}")
        if every and not self.evaluate.benchmarks:
            raise ValueError(f'evaluate.every={every} wants a benchmark: evaluate.benchmarks.NAME="data=..."')
        return self

    @model_validator(mode="after")
    def sources_are_of_the_model(self) -> Run:
        forms = self.model.FORMS
        for name, source in self.sources.items():
            if source.form not in forms:
                raise ValueError(f"sources.{name}.form={source.form}: {self.model.family} takes {' or '.join(forms)}")
        return self

    @model_validator(mode="after")
    def what_is_sorted_is_in_no_order(self) -> Run:
        if self.loader.by_length and all(source.order != "random" for source in self.sources.values()):
            raise ValueError("loader.by_length=true is of sources of order=random, and there is none: leave it out")
        return self

    @model_validator(mode="after")
    def a_projector_is_there(self) -> Run:
        model = self.model
        learns = isinstance(model, ClipFlanT5) and "language" in model.trainable and model.language.name
        if learns and not self.start and not model.weights:
            raise ValueError(
                "the language model learns from a projector that is trained already: give start=RUN of a first "
                "stage, or model.weights=mm_projector.bin"
            )
        return self

    @field_validator("sources")
    @classmethod
    def names_are_plain(cls, sources: dict[str, Source]) -> dict[str, Source]:
        for name in sources:
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(f"source name {name!r} must be lower-case letters, digits and _")
        return sources


class Site(Part):
    """What is true of this cluster and user, said once: a TOML file, or the environment, which wins."""

    store: str = Field("data", description="where corpora lie: s3://bucket/prefix or a folder (HPC_MM_STORE)")
    runs: str = Field("runs", description="where run folders lie, seen by every node (HPC_MM_RUNS)")
    slurm: dict[str, Any] = Field({}, description="any value of the slurm part: partition, account, ...")


@dataclass(frozen=True)
class ImageSpec:
    """The picture a vision tower wants: size x size pixels, (value - mean) / std per RGB channel, values in [0, 1]."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    square: Square = "crop"
    tokens: int = 1  # places that an image takes among a row's tokens


def read_run(path: str | Path) -> Run:
    """The frozen run of ``run.json`` (or of the folder that holds it)."""
    file = Path(path)
    if file.is_dir():
        file = file / "run.json"
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(f"no run at {path}: {error.strerror} ({file})") from None
    try:
        return Run.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{file}: {one_line(error, Run)}") from None
