"""Acceptance 4: each bad input gets one clear line, exit code 2, and nothing is made or lost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import SMALL, Call, refused, with_
from safetensors.torch import save_file
from torch import Tensor

from fedkl.key import Key
from fedkl.models import build
from fedkl.rng import derive

FACTORIES = """
import torch
number = 3
def nothing(): return None
def broken(): raise RuntimeError("out of order")
def flat(num_classes, channels, image_size):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.AdaptiveAvgPool1d(num_classes))
def grey():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
def three(channels, image_size):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * image_size**2, 3))
"""


TRAIN = ["train", *SMALL, "--rounds", "1", "--out", "{tmp}/new"]
KL = [*TRAIN, "--method", "fedkl"]
CHANNEL = ["--defense", "channel"]
RESUME = ["train", "--out", "{tmp}/run", "--resume"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of everything that is wrong."""
    (tmp_path / "file").write_text("I am a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd_models.py").write_text(FACTORIES)
    (tmp_path / "broken.toml").write_text("[training\nlr = 1")
    (tmp_path / "typo.toml").write_text("[training]\nlerning_rate = 0.1\nlr = 0.1")
    (tmp_path / "section.toml").write_text("[trainign]\nlr = 0.1")
    (tmp_path / "type.toml").write_text('[training]\nlr = "fast"')
    (tmp_path / "table.toml").write_text("training = 5")
    (tmp_path / "method.toml").write_text('[federation]\nmethod = "fedprox"')
    (tmp_path / "idle.toml").write_text("[defense]\nlength = 9")
    (tmp_path / "latin.toml").write_bytes(b'x = "\xe9"')
    save_file(other_model(), tmp_path / "other.safetensors")
    diverged = other_model(10)
    diverged["fc.bias"].fill_(torch.nan)
    save_file(diverged, tmp_path / "nan.safetensors")
    (tmp_path / "pass.txt").write_text("right\n")
    (tmp_path / "wrong.txt").write_text("wrong\n")
    (tmp_path / "blank.txt").write_text("\n")
    Key.generate().save(tmp_path / "locked.key", passphrase="right")
    Key.generate().save(tmp_path / "open.key")
    (tmp_path / "cut.key").write_bytes((tmp_path / "open.key").read_bytes()[:60])
    (tmp_path / "cut.key").chmod(0o600)
    np.save(tmp_path / "square.npy", np.zeros((3, 3)))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    (tmp_path / "file.npy").write_text("no array")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def other_model(classes: int = 3) -> dict[str, Tensor]:
    return build("lenet", num_classes=classes, image_size=16, generator=derive(0, "x")).state_dict()


BAD: list[tuple[str, Sequence[str], Sequence[str]]] = [
    ("no such command", ["trian"], ["trian", "train"]),
    ("no such flag", [*TRAIN, "--clintes", "3"], ["--clintes", "--clients"]),
    ("no folder", ["train", *SMALL], ["--out"]),
    ("option twice", [*TRAIN, "--clients", "3", "--clients=4"],
     ["--clients was given 2 times", "takes one value", "train --help"]),
    ("option and its opposite", [*TRAIN, "--augment", "--no-augment"],
     ["--augment or --no-augment was given 2 times"]),
    ("two runs of an audit", ["audit", "--out", "{tmp}/new", "--run", "{tmp}/a", "--run",
      "{tmp}/b"], ["--run was given 2 times", "once for each", "audit --help"]),
    ("two updates", ["audit-update", "--after", "{tmp}/a", "--after", "{tmp}/b"],
     ["--after was given 2 times"]),
    ("two runs of a certificate", ["certify", "--run", "{tmp}/a", "--run", "{tmp}/b"],
     ["--run was given 2 times"]),
    ("two folders of a demo", ["demo", "--rounds", "0", "--out", "{tmp}/a", "--out", "{tmp}/b"],
     ["--out was given 2 times"]),
    ("two splits", ["evaluate", "{tmp}/a", "--split", "test", "--split", "validation"],
     ["--split was given 2 times"]),
    ("two models", ["inspect", "--model", "lenet", "--model", "resnet18"],
     ["--model was given 2 times"]),
    ("two vectors", ["keygen", "{tmp}/a", "--from-vector", "{tmp}/a", "--from-vector", "{tmp}/b"],
     ["--from-vector was given 2 times"]),
    ("not a number", [*TRAIN, "--clients", "three"], ["--clients", "integer", "train --help"]),
    ("model", [*TRAIN, "--model", "lenett"], ["'lenett'", "'lenet'"]),
    ("data set", with_(TRAIN, "--dataset", "fashon-mnist"), ["'fashon-mnist'", "'fashion-mnist'"]),
    ("method", [*TRAIN, "--method", "fedavgg"], ["'fedavgg'", "'fedavg'"]),
    ("defense", [*TRAIN, "--defense", "chanel"], ["'chanel'", "'channel'"]),
    ("optimizer", [*TRAIN, "--optimizer", "adamm"], ["'adamm'", "'adam'", "--optimizer"]),
    ("schedule", [*TRAIN, "--schedule", "cosin"], ["'cosin'", "'cosine'"]),
    ("partition", [*TRAIN, "--partition", "dirichle"], ["'dirichle'", "'dirichlet'"]),
    ("preset", [*TRAIN, "--preset", "papper"], ["'papper'", "'paper'"]),
    ("lock preset", [*KL, "--lock-preset", "papr"], ["'papr'", "'paper'"]),
    ("activation", [*KL, *CHANNEL, "--activation", "relou"], ["'relou'", "'relu'"]),
    ("key law", [*KL, *CHANNEL, "--key-law", "signs"], ["'signs'", "'sign'"]),
    ("zero clients", [*TRAIN, "--clients", "0"], ["clients", "at least 1", "got 0", "--clients"]),
    ("zero images beside one channel", [*TRAIN, "--channels", "1", "--samples", "0"],
     ["samples must be a number of at least 1, got 0. (given as --samples)"]),
    ("zero rounds", with_(TRAIN, "--rounds", "0"), ["rounds", "at least 1", "--rounds"]),
    ("negative rate", [*TRAIN, "--lr", "-1"], ["lr must be a positive number", "--lr"]),
    ("rate of nan", [*TRAIN, "--lr", "nan"], ["lr must be a positive number"]),
    ("fraction", [*TRAIN, "--fraction", "1.5"], ["fraction", "(0, 1]", "1.5"]),
    ("dropout", [*TRAIN, "--dropout", "2"], ["dropout", "[0, 1]"]),
    ("batch of nothing", [*TRAIN, "--batch-size", "0"], ["batch_size", "--batch-size"]),
    ("no worker", [*TRAIN, "--workers", "0"], ["workers", "at least 1"]),
    ("negative seed", [*TRAIN, "--seed", "-1"], ["seed", "at least 0"]),
    ("two channels", [*TRAIN, "--channels", "2"], ["channels must be 1 or 3", "--channels"]),
    ("spread", [*KL, "--spread", "-1"], ["spread must be a positive number", "--spread"]),
    ("key length", [*KL, *CHANNEL, "--key-length", "0"], ["length", "at least 1"]),
    ("milestones", [*TRAIN, "--milestones", "ten"], ["--milestones", "'ten'", "60,120,160"]),
    ("too many wanted", [*TRAIN, "--min-clients", "9"], ["min_clients is 9", "only 3"]),
    ("no such layer", [*KL, "--layers", "conv9"], ["conv9"]),
    ("no regular expression", [*KL, "--layers", "conv["], ["conv[", "regular expression"]),
    ("inserted norm", [*KL, "--norm", "layer"], ["'layer'", "batch"]),
    ("contradiction", [*KL, "--defense", "norm"], ["--method fedkl", "'norm'"]),
    ("two locks", [*TRAIN, "--defense", "channel+norm"], ["two locks"]),
    ("device", [*TRAIN, "--device", "abacus"], ["'abacus'", "cpu"]),
    ("missing data", with_(TRAIN, "--dataset", "mnist", "--data-root", "{tmp}/empty"),
     ["'mnist' not found", "Ways to get it", "--data-root"]),
    ("no folder of images", with_(TRAIN, "--dataset", "imagenet"),
     ["'imagenet' not found", "train/"]),
    ("root for digits", [*TRAIN, "--data-root", "{tmp}/empty"], ["scikit-learn"]),
    ("too many images", [*TRAIN, "--samples", "5000"], ["15000 images", "Use fewer"]),
    ("empty partition", [*TRAIN, "--clients", "5000"], ["5000 clients", "at most one per image"]),
    ("empty client", [*TRAIN, "--partition", "dirichlet", "--alpha", "1e-6", "--clients", "90"],
     ["Dirichlet", "90 clients", "larger alpha"]),
    ("factory not there", [*TRAIN, "--model", "no_such_thing:net"],
     ["'no_such_thing'", "cannot be imported"]),
    ("factory without name", [*TRAIN, "--model", "odd_models:net"], ["no attribute 'net'"]),
    ("factory is a number", [*TRAIN, "--model", "odd_models:number"], ["not callable"]),
    ("factory gives nothing", [*TRAIN, "--model", "odd_models:nothing"],
     ["returned a NoneType", "torch.nn.Module"]),
    ("factory raises", [*TRAIN, "--model", "odd_models:broken"], ["RuntimeError: out of order"]),
    ("nothing to lock", [*KL, "--model", "odd_models:flat"], ["lock"]),
    ("model of other channels", [*TRAIN, "--model", "odd_models:grey"],
     ["'odd_models:grey' does not run on images of 3x16x16", "channels"]),
    ("model of other classes", [*TRAIN, "--model", "odd_models:three"],
     ["gives (2, 3)", "expected (2, 10)", "num_classes"]),
    ("images too small", [*TRAIN, "--model", "alexnet"], ["'alexnet' does not run", "3x16x16"]),
    ("weights of NaN", [*TRAIN, "--init", "{tmp}/nan.safetensors"], ["NaN", "in: fc.bias"]),
    ("grey for torchvision", [*TRAIN, "--model", "alexnet", "--channels", "1"], ["3 channels"]),
    ("no weights", [*TRAIN, "--init", "{tmp}/none.safetensors"], ["none.safetensors"]),
    ("weights of another", [*TRAIN, "--init", "{tmp}/other.safetensors"],
     ["not of this model", "fc.weight"]),
    ("weights of nothing", [*TRAIN, "--init", "{tmp}/file"], ["cannot be read as safetensors"]),
    ("no TOML", [*TRAIN, "--config", "{tmp}/none.toml"], ["none.toml", "check --config"]),
    ("broken TOML", [*TRAIN, "--config", "{tmp}/broken.toml"], ["not a TOML file", "line 1"]),
    ("TOML in latin-1", [*TRAIN, "--config", "{tmp}/latin.toml"], ["not a TOML file"]),
    ("typo in TOML", [*TRAIN, "--config", "{tmp}/typo.toml"], ["'lerning_rate'", "typo.toml"]),
    ("section of TOML", [*TRAIN, "--config", "{tmp}/section.toml"], ["'trainign'", "'training'"]),
    ("type in TOML", [*TRAIN, "--config", "{tmp}/type.toml"], ["expected float, got 'fast'"]),
    ("no table in TOML", [*TRAIN, "--config", "{tmp}/table.toml"], ["expected a table", "5"]),
    ("method in TOML", [*TRAIN, "--config", "{tmp}/method.toml"], ["'fedprox'", "fedavg"]),
    ("folder is a file", [*TRAIN[:-1], "{tmp}/file"], ["file", "not a folder", "--out"]),
    ("folder without a name", [*TRAIN[:-1], ""], ["--out", "empty path"]),
    ("audit into nowhere", ["audit", "--out", ""], ["--out", "empty path"]),
    ("certify into nowhere", ["certify", "--out", ""], ["--out", "empty path"]),
    ("demo into nowhere", ["demo", "--out", " "], ["--out", "empty path"]),
    ("key without a name", ["keygen", ""], ["empty path"]),
    ("folder below a file", [*TRAIN[:-1], "{tmp}/file/a/b"], ["file is not a folder", "--out"]),
    ("resume of nothing", [*TRAIN, "--resume"], ["no run to resume", "--out"]),
    ("evaluate nothing", ["evaluate", "{tmp}/empty"], ["no run", "check the path"]),
    ("evaluate nowhere", ["evaluate", "{tmp}/nowhere"], ["no run", "check the path"]),
    ("inspect nothing", ["inspect"], ["--model"]),
    ("inspect too much", ["inspect", "{tmp}/open.key", "--model", "lenet"], ["one thing"]),
    ("inspect nowhere", ["inspect", "{tmp}/nowhere"], ["nowhere", "No such file"]),
    ("inspect no run", ["inspect", "{tmp}/empty"], ["no run"]),
    ("inspect no key", ["inspect", "{tmp}/file"], ["file"]),
    ("inspect no model", ["inspect", "--model", "lenett"], ["'lenett'", "'lenet'"]),
    ("inspect no defense", ["inspect", "--model", "lenet", "--defense", "pat"], ["'pat'"]),
    ("inspect a key with settings",
     ["inspect", "{tmp}/open.key", "--layers", "first", "--norm", "group"],
     ["--layers and --norm are for --model", "leave"]),
    ("inspect a model with a passphrase",
     ["inspect", "--model", "lenet", "--passphrase-file", "/nope"],
     ["--passphrase-file is for key files"]),
    ("inspect something else", ["inspect", "{tmp}/broken.toml"], ["not a whole FedKL key file"]),
    ("inspect an open file", ["inspect", "{tmp}/odd_models.py"], ["not a whole FedKL key file"]),
    ("half a key", ["inspect", "{tmp}/cut.key"], ["not a whole FedKL key file"]),
    ("wrong passphrase", ["inspect", "{tmp}/locked.key", "--passphrase-file", "{tmp}/wrong.txt"],
     ["locked.key does not open", "passphrase is wrong"]),
    ("needless passphrase", ["inspect", "{tmp}/open.key", "--passphrase-file", "{tmp}/pass.txt"],
     ["not encrypted", "leave the passphrase out"]),
    ("empty passphrase", ["keygen", "{tmp}/a.key", "--passphrase-file", "{tmp}/blank.txt"],
     ["blank.txt is empty"]),
    ("no passphrase file", ["keygen", "{tmp}/a.key", "--passphrase-file", "{tmp}/none"],
     ["none cannot be read", "No such file"]),
    ("no terminal", ["keygen", "{tmp}/a.key", "--passphrase"], ["FEDKL_PASSPHRASE"]),
    ("key is there", ["keygen", "{tmp}/open.key"],
     ["open.key exists already", "is lost", "move that file away"]),
    ("key without a folder", ["keygen", "{tmp}/none/a.key"], ["Create the folder first"]),
    ("pad with a lock's preset", [*TRAIN, "--defense", "pad", "--lock-preset", "paper"],
     ["--lock-preset does nothing", "--defense channel", "got --defense pad"]),
    ("pad with a key's length", [*TRAIN, "--defense", "pad", "--key-length", "5", "--chain"],
     ["--key-length does nothing", "--defense channel", "got --defense pad"]),
    ("no lock with a key's length", [*TRAIN, "--key-length", "5"], ["got --defense none"]),
    ("no lock with a spread", [*TRAIN, "--spread", "2"], ["--spread", "--defense channel or pad"]),
    ("norm with a stem", [*TRAIN, "--defense", "norm", "--shared-stem"],
     ["--private-stem or --shared-stem does nothing", "pad or open-pad"]),
    ("channel with a budget", [*TRAIN, *CHANNEL, "--on-spent", "error", "--renew-every", "1"],
     ["--on-spent does nothing", "--defense pad"]),
    ("centralized with a budget", with_(KL, "--method", "centralized", "--defense", "pad",
     "--budget", "9"), ["--budget does nothing", "--method fedavg or fedsgd"]),
    ("seals without one key", [*KL, "--seal-private"],
     ["--seal-private without --one-key", "Add --one-key"]),
    ("layers kept without one key", [*KL, "--keep-private"],
     ["--keep-private does nothing", "it is for --one-key, got --own-keys;"]),
    ("seals of no key", [*TRAIN, "--defense", "fedbn", "--one-key", "--seal-private"],
     ["does nothing", "--defense channel or pad", "got --defense fedbn"]),
    ("stagger of nothing", [*KL, "--stagger"], ["--stagger", "--renew-every 1 or more"]),
    ("steps after no renewal", [*KL, "--renew-steps", "3"], ["--renew-every or --on-spent renew"]),
    ("sgd with epochs", [*TRAIN[:1], "--method", "fedsgd", "--local-epochs", "5", *TRAIN[-2:]],
     ["--local-epochs does nothing", "fedavg or centralized", "got --method fedsgd"]),
    ("epochs beside steps", [*TRAIN, "--local-epochs", "5"],
     ["--local-epochs does nothing", "--local-steps 2"]),
    ("alpha of nothing", [*TRAIN, "--alpha", "3"],
     ["--alpha does nothing", "--partition dirichlet", "got --partition iid"]),
    ("shards of nothing", [*TRAIN, "--shards-per-client", "3"], ["--partition shards"]),
    ("milestones of nothing", [*TRAIN, "--milestones", "3,4"], ["--schedule step", "constant"]),
    ("momentum of nothing", [*TRAIN, "--optimizer", "adam", "--momentum", "0.5"],
     ["--momentum does nothing", "sgd or rmsprop", "adam"]),
    ("wrong keys of no lock", [*TRAIN, "--wrong-keys", "3"],
     ["--wrong-keys does nothing", "--defense channel or pad", "got --defense none"]),
    ("wrong keys of no key", [*TRAIN, "--defense", "fedbn", "--wrong-keys", "3"],
     ["--wrong-keys does nothing", "got --defense fedbn"]),
    ("images of no wrong keys", [*TRAIN, "--wrong-key-images", "30"],
     ["--wrong-key-images does nothing", "--defense fedbn or channel"]),
    ("thief of no lock", [*TRAIN, "--defense", "norm", "--thief-images", "50"],
     ["--thief-images does nothing", "got --defense norm"]),
    ("calibration of no lock", [*TRAIN, "--calibration-images", "10"],
     ["--calibration-images does nothing", "got --defense none"]),
    ("gain of nothing learned", [*KL, "--learned", "none", "--gain", "9"],
     ["--gain does nothing", "got --learned none"]),
    ("nothing learned is kept", [*KL, "--learned", "none", "--renew-every", "1", "--keep-learned"],
     ["--keep-learned or --restart-learned does nothing", "got --learned none"]),
    ("spread of locks that are not", [*KL, "--layers", "first", "--inner-spread", "9"],
     ["--inner-spread does nothing", "--lock-head-input", "got --layers first"]),
    ("law of locks that are not", [*KL, "--layers", "first", "--inner-scale-law", "sign"],
     ["--inner-scale-law does nothing", "got --layers first"]),
    ("gain of the paper's lock", [*KL, "--lock-preset", "paper", "--gain", "2"],
     ["--gain does nothing", "--lock-preset paper"]),
    ("nothing of a file", [*TRAIN, "--config", "{tmp}/idle.toml"],
     ["defense.length in", "idle.toml does nothing", "got --defense none"]),
    ("nothing of an audit", ["audit", "--defenses", "channel", "--budget", "9",
     "--out", "{tmp}/new"], ["--budget does nothing", "--defenses none,norm,fedbn,channel"]),
    ("budget of a first round", [*KL, "--on-spent", "error"],
     ["round 1", "128 presentations", "budget of 1.", "(--budget 128)"]),
    ("key below a file", ["keygen", "{tmp}/file/a.key"], ["cannot write", "a.key"]),
    ("no vector", ["keygen", "{tmp}/a.key", "--from-vector", "{tmp}/file.npy"], ["numpy.save"]),
    ("no vector file", ["keygen", "{tmp}/a.key", "--from-vector", "{tmp}/no.npy"], ["no.npy"]),
    ("vector of words", ["keygen", "{tmp}/a.key", "--from-vector", "{tmp}/words.npy"],
     ["real numbers"]),
    ("square vector", ["keygen", "{tmp}/a.key", "--from-vector", "{tmp}/square.npy"],
     ["shape (3, 3)", "one dimension"]),
    ("demo into a file", ["demo", "--dataset", "digits", "--out", "{tmp}/file"], ["not a folder"]),
    ("demo of nothing", ["demo", "--rounds", "0", "--out", "{tmp}/new"], ["rounds", "--rounds"]),
    ("demo of what", ["demo", "--dataset", "mnits", "--out", "{tmp}/new"], ["'mnits'", "'mnist'"]),
]  # fmt: skip


@pytest.mark.parametrize("words, fragments", [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(call: Call, place: Path, words: Sequence[str], fragments: Sequence[str]) -> None:
    refused(call, place, words, fragments)


def test_the_table_is_long_enough() -> None:
    assert len({row[0] for row in BAD}) == len(BAD) >= 30
