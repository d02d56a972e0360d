"""Every setting of a run as an option. Written out here, so that ``--help`` need not load torch.

A test compares this table with the dataclasses and registries of ``fedkl.federation``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from fedkl.cli.needs import (
    CALENDAR,
    CHANNEL,
    DIRICHLET,
    EXAMINED,
    EXAMINED_KEYS,
    GROUPED,
    INNER,
    KEYED,
    LEARNING,
    MOMENTUM,
    NOISE,
    NORMED,
    ONE,
    PAD,
    PADS,
    PASSES,
    PRIVATE,
    PRUNE,
    RENEWING,
    SGD,
    SHARDS,
    SPREAD,
    STEP,
    STEPPING,
    TOGETHER,
    Need,
)

METHODS: Final = ("centralized", "fedavg", "fedsgd", "fedkl")
DATASETS: Final = ("fashion-mnist", "mnist", "cifar10", "cifar100", "imagenet", "digits")
PARTITIONS: Final = ("iid", "shards", "dirichlet")
MODELS: Final = ("lenet", "resnet20", "resnet32", "resnet18", "resnet34", "vgg16")
DEFENSES: Final = ("none", "norm", "fedbn", "channel", "pad", "open-pad", "noise", "prune")
LOCK_PRESETS: Final = ("paper", "paper-sigmoid")
INSERTED: Final = ("batch", "group", "instance")
ACTIVATIONS: Final = ("identity", "relu", "sigmoid", "tanh")
LAWS: Final = ("sign", "uniform", "normal")
SCALE_LAWS: Final = ("near-one", "normal", "sign", "wide")
LEARNED: Final = ("position", "channel", "none")
ON_SPENT: Final = ("warn", "error", "renew")
OPTIMIZERS: Final = ("sgd", "adam", "rmsprop", "adadelta")
SCHEDULES: Final = ("constant", "step", "cosine")
ATTACKS: Final = (
    "dlg", "idlg", "inverting-gradients", "grnn", "ggl", "closed-form", "peel",
    "shadow", "shadow-global", "shadow-label", "shadow-gradient",
    "retrieval", "retrieval-label", "retrieval-transport", "replay", "replay-matched",
    "replay-relations",
)  # fmt: skip
THREATS: Final = (
    "key-unknown", "key-regressed", "key-shared", "lock-gradient", "adaptive", "block-ignored",
    "crafting",
)  # fmt: skip
EFFORTS: Final = ("quick", "standard", "paper")
STAGES: Final = ("initial", "mid", "final")


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        path: ``section.field`` of the configuration, or ``field`` at its top.
        flag: How it is written on the command line; ``--yes/--no`` for booleans.
        kind: Type of the option's value; ``tuple`` is a list of integers with commas.
        default: Default of the configuration.
        help: One line.
        choices: Names that are known; shown, and checked where the configuration is built.
        needs: What the rest of the configuration must have for it to do anything.
        defaults: Defaults that depend on the defense, where ``default`` is None.
    """

    path: str
    flag: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.path.replace(".", "_")

    @property
    def section(self) -> str:
        """Section of the configuration, "" at its top."""
        return self.path.rpartition(".")[0]

    @property
    def text(self) -> str:
        """The help line with choices, what it is for, and default."""
        choices = f" One of: {', '.join(self.choices)}." if self.choices else ""
        needs = f" Only for {', '.join(need.said for need in self.needs)}." if self.needs else ""
        shown = "" if self.default is None else _shown(self.default)
        if self.defaults:
            shown = ", ".join(f"{_shown(value)} ({name})" for name, value in self.defaults)
        return f"{self.help}{choices}{needs}" + (f" Default: {shown}." if shown else "")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


PANELS: Final = {
    "federation": "Federation",
    "data": "Data",
    "model": "Model",
    "defense": "Defense",
    "training": "Local training",
    "renewal": "Renewal of pads",
    "evaluation": "Evaluation",
    "": "Run",
}

SETTINGS: Final = (
    Setting("federation.method", "--method", str, "fedavg",
            "How the federation runs; fedkl is short for fedavg with --defense pad.", METHODS),
    Setting("federation.clients", "--clients", int, 3, "Number of clients."),
    Setting("federation.rounds", "--rounds", int, 20, "Rounds (epochs, for centralized)."),
    Setting("federation.fraction", "--fraction", float, 1.0, "Share of clients asked per round.",
            needs=(TOGETHER,)),
    Setting("federation.weighted", "--weighted/--plain-mean", bool, True,
            "Weight updates by their number of examples.", needs=(TOGETHER,)),
    Setting("federation.dropout", "--dropout", float, 0.0,
            "Chance that an asked client does not answer."),
    Setting("federation.min_clients", "--min-clients", int, 1,
            "Updates below which a round fails."),
    Setting("federation.join_steps", "--join-steps", int, 10,
            "Lock-only steps of a client before it takes part for the first time.",
            needs=(PRIVATE, TOGETHER)),
    Setting("federation.settle_steps", "--settle-steps", int, 50,
            "Slow lock-only steps before a client uses a global model; if not given none with "
            "--seal-private, where they fit it to the client's own labels.",
            needs=(PRIVATE, TOGETHER)),
    Setting("data.dataset", "--dataset", str, "fashion-mnist", "Data set.", DATASETS),
    Setting("data.root", "--data-root", str, None, "Folder of the data set's files."),
    Setting("data.image_size", "--image-size", int, 32, "Height and width in pixels."),
    Setting("data.channels", "--channels", int, 3, "1 (grey) or 3."),
    Setting("data.augment", "--augment/--no-augment", bool, False, "Random crops and flips."),
    Setting("data.partition", "--partition", str, "iid",
            "How images are dealt to clients.", PARTITIONS),
    Setting("data.alpha", "--alpha", float, 0.5,
            "Concentration of the Dirichlet distribution by which each class is dealt: the "
            "smaller, the more unequal.", needs=(DIRICHLET,)),
    Setting("data.shards_per_client", "--shards-per-client", int, 2,
            "Pieces of the images, sorted by class, that each client gets; few pieces are few "
            "classes.", needs=(SHARDS,)),
    Setting("data.samples", "--samples", int, None, "Images per client; train takes all it has."),
    Setting("model.name", "--model", str, "lenet",
            "Model by name, any torchvision classification model, or package.module:factory.",
            MODELS),
    Setting("model.init", "--init", str, None, "safetensors file to start from."),
    Setting("defense.name", "--defense", str, "none",
            "What a client does to protect itself; several are joined by +, as in norm+noise, and "
            "come in that order. channel is the paper's lock (a secret scale and shift per "
            "channel), pad the hardened one (per position, first layer and classifier private). To "
            "compare with: none, norm (the norm a lock stands on, shared), fedbn (that norm "
            "private, without a key), open-pad (the pad's network without a key: everything secret "
            "is learned instead of drawn), and what is usual elsewhere: noise (updates are clipped "
            "and get Gaussian noise) and prune (the largest entries of each tensor are sent).",
            DEFENSES),
    Setting("defense.preset", "--lock-preset", str, None, "The lock as published.", LOCK_PRESETS,
            needs=(CHANNEL,)),
    Setting("defense.layers", "--layers", str, "all",
            "Where locks stand: first, all, a module's name, or a regular expression that matches "
            "whole names, as layer1.* does all below layer1.", needs=(NORMED,)),
    Setting("defense.behind", "--behind", str, None,
            "Module behind which the first lock stands, such as a whole stage; of --layers those "
            "count that run later. A pad there makes all before it private.", needs=(NORMED,)),
    Setting("defense.norm", "--norm", str, "batch", "Norm inserted where there is none.", INSERTED,
            needs=(NORMED,)),
    Setting("defense.share_statistics", "--share-statistics/--private-statistics", bool, False,
            "Share running statistics of locked norms, as the paper's code does.",
            needs=(PRIVATE,)),
    Setting("defense.group_key", "--group-key/--no-group-key", bool, True,
            "Clients share a key that says where their locks start.", needs=(CHANNEL, GROUPED)),
    Setting("defense.one_key", "--one-key/--own-keys", bool, False,
            "All clients hold one and the same key: against the server alone, since each of them "
            "then sees through the others' locks.", needs=(KEYED, TOGETHER)),
    Setting("federation.seal_private", "--seal-private/--keep-private", bool, False,
            "Clients with one key send each other their private layers, encrypted under it, and "
            "go on from the mean; the server hands them on unread.", needs=(ONE, TOGETHER)),
    Setting("defense.spread", "--spread", float, None,
            "Standard deviation, in units of the norm's output, of the secret shift β of a pad's "
            "first lock; for channel, that of the scale γ at the start.", needs=(KEYED,),
            defaults=(("channel", 1.0), ("pad", 3.0))),
    Setting("defense.shift_spread", "--shift-spread", float, None,
            "Standard deviation of the secret shift β alone at the start, in units of the norm's "
            "output.", needs=(CHANNEL, SPREAD), defaults=(("channel", 0.3),)),
    Setting("defense.inner_spread", "--inner-spread", float, None,
            "Standard deviation of the secret shift β of every lock behind the first, in units of "
            "the norm's output.", needs=(PAD, INNER), defaults=(("pad", 0.3),)),
    Setting("defense.gain", "--gain", float, None,
            "How much faster a lock learns than a norm: a step moves it by the learning rate times "
            "the square of this.", needs=(KEYED, SPREAD, LEARNING),
            defaults=(("channel", 3.0), ("pad", 1.0))),
    Setting("defense.activation", "--activation", str, None,
            "Function behind the two maps that turn the key into scale and shift.", ACTIVATIONS,
            needs=(CHANNEL,), defaults=(("channel", "identity"),)),
    Setting("defense.bias", "--lock-bias/--no-lock-bias", bool, None,
            "Whether the two maps that turn the key into scale and shift have a bias.",
            needs=(CHANNEL,), defaults=(("channel", False),)),
    Setting("defense.law", "--key-law", str, None,
            "Distribution of the entries of the key vector.", LAWS,
            needs=(CHANNEL,), defaults=(("channel", "sign"),)),
    Setting("defense.length", "--key-length", int, None, "Number of entries of the key vector.",
            needs=(CHANNEL,), defaults=(("channel", 1024),)),
    Setting("defense.chain", "--chain/--no-chain", bool, None,
            "Whether each lock is fed by the scale and shift of the one before, instead of by the "
            "key.", needs=(CHANNEL,), defaults=(("channel", False),)),
    Setting("defense.scale_law", "--scale-law", str, None,
            "Distribution of the secret scales γ of the first lock.", SCALE_LAWS,
            needs=(PAD,), defaults=(("pad", "wide"),)),
    Setting("defense.inner_scale_law", "--inner-scale-law", str, None,
            "Distribution of the secret scales γ of every lock behind the first.", SCALE_LAWS,
            needs=(PAD, INNER), defaults=(("pad", "near-one"),)),
    Setting("defense.learned", "--learned", str, None,
            "What is learned on top of the drawn scales and shifts: a number per position, a "
            "number per channel, or nothing.", LEARNED,
            needs=(PAD,), defaults=(("pad", "position"),)),
    Setting("defense.stem", "--private-stem/--shared-stem", bool, None,
            "Whether the layers up to the first lock stay with the client.",
            needs=(PADS,), defaults=(("pad", True), ("open-pad", True))),
    Setting("defense.head", "--private-head/--shared-head", bool, None,
            "Whether the classifier, the last linear layer, stays with the client; a pad keeps it "
            "unless nothing would be left to share.",
            needs=(PADS,), defaults=(("open-pad", False),)),
    Setting("defense.lock_head_input", "--lock-head-input/--free-head-input", bool, None,
            "Whether one more lock is put right in front of the classifier.",
            needs=(PADS,), defaults=(("pad", False), ("open-pad", False))),
    Setting("defense.max_length", "--max-length", int, None,
            "Largest number of tokens, for models over tokens; that of the example if not given.",
            needs=(PADS,)),
    Setting("defense.clip", "--clip", float, None,
            "L2 norm to which a client shortens its update where it is longer, before the noise.",
            needs=(NOISE,), defaults=(("noise", 2.5),)),
    Setting("defense.noise_multiplier", "--noise-multiplier", float, None,
            "Standard deviation of the noise on every entry of an update, in units of --clip. No "
            "epsilon is claimed.", needs=(NOISE,), defaults=(("noise", 0.001),)),
    Setting("defense.prune_ratio", "--prune-ratio", float, None,
            "Share of every tensor's entries, the smallest of the change, that is not sent; 0 or "
            "more, below 1.", needs=(PRUNE,), defaults=(("prune", 0.9),)),
    Setting("training.optimizer", "--optimizer", str, "sgd", "Local optimizer.", OPTIMIZERS),
    Setting("training.lr", "--lr", float, 0.05, "Learning rate."),
    Setting("training.momentum", "--momentum", float, 0.9, "Momentum of the optimizer.",
            needs=(MOMENTUM,)),
    Setting("training.nesterov", "--nesterov/--no-nesterov", bool, True,
            "Nesterov's form of the momentum.", needs=(SGD,)),
    Setting("training.weight_decay", "--weight-decay", float, 5e-4, "L2 penalty."),
    Setting("training.schedule", "--schedule", str, "constant",
            "Learning rate over the rounds.", SCHEDULES),
    Setting("training.milestones", "--milestones", tuple, (60, 120, 160),
            "Rounds after which the learning rate falls, with commas.", needs=(STEP,)),
    Setting("training.decay", "--decay", float, 0.2,
            "Factor of the learning rate at each milestone.", needs=(STEP,)),
    Setting("training.batch_size", "--batch-size", int, 64, "Images per step."),
    Setting("training.local_epochs", "--local-epochs", int, 1,
            "Passes over a client's images per round.", needs=(STEPPING, PASSES)),
    Setting("training.local_steps", "--local-steps", int, None, "Steps per round, not passes.",
            needs=(STEPPING,)),
    Setting("training.keep_momentum", "--keep-momentum/--drop-momentum", bool, False,
            "Keep each client's optimizer state from round to round.", needs=(TOGETHER,)),
    Setting("training.update_length", "--update-length", float, None,
            "L2 norm at which every update is sent, so that its size tells nothing; as it is if "
            "not given.", needs=(TOGETHER,)),
    Setting("renewal.budget", "--budget", int, 1,
            "Presentations (images times steps) that one pad may serve; of more than 1 the run "
            "says how many images were found.", needs=(PAD, TOGETHER)),
    Setting("renewal.on_spent", "--on-spent", str, "warn",
            "What happens when a round would exceed the budget.", ON_SPENT,
            needs=(PAD, TOGETHER)),
    Setting("renewal.every", "--renew-every", int, 0, "Rounds between renewals; 0: never.",
            needs=(PAD, TOGETHER)),
    Setting("renewal.stagger", "--stagger/--at-once", bool, False,
            "Clients renew one after the other.", needs=(PAD, TOGETHER, CALENDAR)),
    Setting("renewal.steps", "--renew-steps", int, 10, "Lock-only steps after a renewal.",
            needs=(PAD, TOGETHER, RENEWING)),
    Setting("renewal.keep_learned", "--keep-learned/--restart-learned", bool, False,
            "What was learned on top of a pad stays when it is renewed.",
            needs=(PAD, TOGETHER, RENEWING, LEARNING)),
    Setting("evaluation.every", "--eval-every", int, 5, "Rounds between evaluations; 0: end only."),
    Setting("evaluation.clients", "--eval-clients", int, 3, "At most so many clients measured."),
    Setting("evaluation.images", "--eval-images", int, 2_000, "Validation images, at most."),
    Setting("evaluation.wrong_keys", "--wrong-keys", int, 10, "Fresh wrong keys per client.",
            needs=(EXAMINED_KEYS,)),
    Setting("evaluation.wrong_key_images", "--wrong-key-images", int, 2_000,
            "Images that wrong keys and thieves are tried on, at most.", needs=(EXAMINED,)),
    Setting("evaluation.thief_images", "--thief-images", int, 1_000,
            "Unlabelled images a thief re-estimates statistics on.", needs=(EXAMINED,)),
    Setting("evaluation.calibration_images", "--calibration-images", int, 1_000,
            "Own images a client re-estimates the statistics of its private norms on.",
            needs=(EXAMINED,)),
    Setting("seed", "--seed", int, 0, "Of everything but the keys."),
    Setting("workers", "--workers", int, 1,
            "Processes; the result is the same for any number."),
    Setting("device", "--device", str, "cpu", "Where torch computes: cpu, cuda, cuda:1."),
    Setting("checkpoint_every", "--checkpoint-every", int, 1, "Rounds between checkpoints."),
)  # fmt: skip

PRESETS: Final[dict[str, dict[str, Any]]] = {
    # Ren et al., arXiv 2305.04095, and their released code where the paper says nothing.
    "paper": {
        "federation": {"method": "fedavg", "clients": 3, "rounds": 200, "weighted": False},
        "data": {"partition": "iid"},
        "defense": {"name": "channel", "preset": "paper", "share_statistics": True},
        "training": {
            "optimizer": "sgd",
            "lr": 0.01,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
            "schedule": "step",
            "milestones": [60, 120, 160],
            "decay": 0.2,
            "batch_size": 64,
            "local_epochs": 1,
            "keep_momentum": True,
        },
    },
}
