"""Files of an update, good and bad, for ``fedkl audit-update``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from fedkl.models import build
from fedkl.rng import derive

STEPS = "num_classes = 4\nchannels = 1\nimage_size = 16\nbatch_size = 1\nlr = 0.1\n"


def write_update_files(tmp_path: Path) -> Path:
    """An update, and one of everything that is wrong."""
    model = build("lenet", num_classes=4, channels=1, image_size=16, generator=derive(0, "m"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    save_file(before, tmp_path / "before.safetensors")
    x = torch.rand(1, 1, 16, 16, generator=derive(0, "x"))
    cross_entropy(model(x), torch.tensor([2])).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = {n: t.detach().clone() for n, t in model.state_dict().items()}
    save_file(after, tmp_path / "after.safetensors")
    save_file({"images": x}, tmp_path / "truth.safetensors")
    save_file({"pictures": x}, tmp_path / "no-images.safetensors")
    save_file({"images": x[..., :8].clone()}, tmp_path / "small.safetensors")
    save_file({n: t for n, t in after.items() if n != "fc.bias"}, tmp_path / "less.safetensors")
    save_file({**after, "extra": x}, tmp_path / "more.safetensors")
    save_file({**after, "fc.bias": torch.zeros(5)}, tmp_path / "shape.safetensors")
    save_file({**after, "fc.bias": torch.full((4,), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({n: t.half() for n, t in after.items()}, tmp_path / "half.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "after.safetensors").read_bytes()[:99])
    (tmp_path / "steps.toml").write_text(STEPS)
    (tmp_path / "typo.toml").write_text(STEPS + "batch_sice = 1\n")
    (tmp_path / "type.toml").write_text(STEPS.replace("= 0.1", '= "fast"'))
    (tmp_path / "zero.toml").write_text(STEPS.replace("batch_size = 1", "batch_size = 0"))
    (tmp_path / "labels.toml").write_text(STEPS + "labels = [1, 2]\n")
    (tmp_path / "class.toml").write_text(STEPS + "labels = [4]\n")
    (tmp_path / "momentum.toml").write_text(STEPS + "momentum = -0.5\n")
    (tmp_path / "huge.toml").write_text(STEPS.replace("= 0.1", "= 1e40"))
    (tmp_path / "tiny.toml").write_text(STEPS.replace("= 0.1", "= 1e-300"))
    (tmp_path / "tiny2.toml").write_text(STEPS.replace("= 0.1", "= 1e-300\nlocal_steps = 2"))
    (tmp_path / "still.toml").write_text(STEPS.replace("= 0.1", "= 0"))
    (tmp_path / "nesterov.toml").write_text(STEPS + "nesterov = true\n")
    save_file({"images": 255 * x}, tmp_path / "bright.safetensors")
    save_file({"images": x.repeat(2, 1, 1, 1)}, tmp_path / "two.safetensors")
    (tmp_path / "rate.toml").write_text(STEPS.replace("lr = 0.1", "local_steps = 2"))
    (tmp_path / "broken.toml").write_text("lr = ")
    ten = build("lenet", num_classes=10, channels=1, image_size=16, generator=derive(0, "ten"))
    start = {n: t.clone() for n, t in ten.state_dict().items()}
    save_file(start, tmp_path / "before10.safetensors")
    x = torch.rand(1, 1, 16, 16, generator=derive(1, "x"))
    cross_entropy(ten(x), torch.tensor([2])).backward()
    torch.optim.SGD(ten.parameters(), lr=0.1).step()
    save_file(
        {n: t.detach().clone() for n, t in ten.state_dict().items()},
        tmp_path / "after10.safetensors",
    )
    (tmp_path / "ten.toml").write_text(STEPS.replace("num_classes = 4", "num_classes = 10"))
    (tmp_path / "nothing.json").write_text("[]")
    (tmp_path / "odd.json").write_text('{"scheme": "channel"}')
    (tmp_path / "seven.toml").write_text(STEPS + "local_steps = 7\nmomentum = 0.9\n")
    for name, file in (
        ("a-run", "config.json"),
        ("an-audit", "audit-config.json"),
        ("an-update", "update.json"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "file").write_text("I am a file")
    (tmp_path / "empty").mkdir()
    return tmp_path
