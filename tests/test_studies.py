"""The studies' plans are audits that can be run, and their tables say what the audits said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).resolve().parent.parent / "studies"


@pytest.fixture(autouse=True)
def studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    for path in STUDIES.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)


def summary(defense: str, threat: str, role: str, verdict: str) -> dict[str, Any]:
    from fedkl.audit.verdicts import MEANS, RATES

    mean = {"mean": 0.25, "low": 0.125, "high": 0.5}
    return {
        "attack": "dlg", "defense": defense, "threat": threat, "n": 20, "role": role,
        "verdict": verdict, **dict.fromkeys((*MEANS, *RATES), mean),
    }  # fmt: skip


def test_every_planned_audit_is_one(tmp_path: Path) -> None:
    import leakage

    from fedkl.audit import AuditConfig

    for plan in leakage.AUDITS.values():
        for arm, threats in plan.arms.items():
            run = leakage.settings_of(plan.model, arm, tmp_path)
            audit = AuditConfig(
                run=run,
                defenses=(run.defense.name,),
                attacks=plan.attacks,
                threats=threats,
                stage=plan.stage,
                effort=plan.effort,
            )
            assert audit.judged == (leakage.ARMS[arm]["name"],)
            assert "adaptive" in threats  # else the cells of fedbn could not be shared


def test_the_study_of_leaks_fits_two_cores_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    import leakage

    every = ",".join(leakage.ARMS)
    federations, rows = leakage.planned(",".join(leakage.AUDITS), every, tmp_path)
    assert list(rows) == list(leakage.AUDITS)
    cost = sum(job.cost for job in (*federations.values(), *rows.values()))
    assert cost / 2 <= 2.5 * 3600
    assert max(job.cost for job in rows.values()) <= cost / 4  # else one process waits
    # Every federation that a row audits is trained once, before two rows could both train it.
    trained = {(job.model, arm) for job in federations.values() for arm in job.arms}
    assert trained >= {(job.model, arm) for job in rows.values() for arm in job.arms}
    assert len(trained) == len(federations)

    _, part = leakage.planned("lenet-final", "pad", tmp_path)  # is no result of the whole row
    assert [(name, job.arms) for name, job in part.items()] == [("lenet-final_pad", ("pad",))]
    for only, arms in (("lenet-fnal", every), ("lenet-final", "pda")):
        with pytest.raises(SystemExit, match="got "):
            leakage.planned(only, arms, tmp_path)


def test_controls_that_audits_share_appear_once_and_verdicts_as_given() -> None:
    import leakage

    def audit(arm: str, verdict: str) -> dict[str, Any]:
        return {
            "arm": arm,
            "commit": "abc",
            "summary": [
                summary("none", "open", "control", "leaks"),
                summary("channel", "adaptive", "defense", verdict),
            ],
            "attacks": {"a": "DLG(iterations=300)"},
            "accuracy": {"none": None, "channel": None},
            "verdict": {"defenses": {"channel": {"verdict": verdict, "reason": f"for {arm}."}}},
            "seconds": 60.0,
        }

    arms = {"channel": audit("channel", "leaks"), "paper-sigmoid": audit("paper-sigmoid", "holds")}
    document = {"command": "c", "commit": "0", "date": "d", "audits": {"lenet-initial": arms}}
    rows = leakage.rows_of(document, "lenet-initial")
    assert [row["arm"] for row in rows] == ["none", "channel", "paper-sigmoid"]
    text = leakage.markdown(document)
    assert "| none | open |" in text
    assert "(leaks) |" in text
    assert "**paper-sigmoid** (channel): holds. for paper-sigmoid." in text
    assert "2 minutes" in text


def test_a_control_is_missed_below_its_target() -> None:
    import controls

    good = {"ssim": [0.95] * 4 + [0.1], "labels right": 1.0}
    assert controls.judged("dlg photos", good)["met"] is True
    assert controls.judged("dlg photos", {**good, "ssim": [0.95] * 3 + [0.1] * 2})["met"] is False
    assert controls.judged("grnn fashion", good)["met"] is False
    floor = {**good, "ssim_aligned": [0.6] * 5, "floor_aligned": [0.5] * 5}
    assert controls.judged("ggl fashion trained", floor)["met"] is True
    assert controls.judged("ggl fashion trained", {**floor, "labels right": 0.8})["met"] is False


def test_a_failed_cell_costs_no_other_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cells

    (tmp_path / "inverse.py").write_text("def work(name, cell):\n    return {'of': 1 / cell}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import inverse  # type: ignore[import-not-found]

    jobs, costs = {"bad": 0, "good": 4}, {"bad": 2.0, "good": 1.0}  # the bad one goes first
    with pytest.raises(ZeroDivisionError):
        cells.run_cells(jobs, inverse.work, tmp_path / "cells", processes=1, costs=costs)
    assert "bad failed, the others go on: ZeroDivisionError" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["good.json"]
    again = cells.run_cells({"good": 4}, inverse.work, tmp_path / "cells", processes=1, costs=costs)
    assert again == {"good": {"of": 0.25}}


def test_exchanged_victims_keep_their_class_and_nobody_keeps_what_was_their_own() -> None:
    import torch
    from replayers import ReplayBench

    bench = ReplayBench.__new__(ReplayBench)
    bench.labels = torch.arange(200) % 10
    bench.seen = torch.arange(200.0)[:, None]
    made = bench.shuffled().flatten().long()
    assert sorted(made.tolist()) == list(range(200))
    assert bench.labels[made].equal(bench.labels)
    assert not bool((made == torch.arange(200)).any())


def thief(arm: str, seed: int, draws: list[float]) -> dict[str, Any]:
    """What a cell of studies/thieves.py found: the same at 1, 10 and 100 labels a class."""
    one = {"draws": draws, "way": "everything", "rate": 0.01, "first_draw": {"as it is, 0": 0.1}}
    labels = dict.fromkeys(("1", "10", "100"), one)
    return {"cell": {"arm": arm, "seed": seed}, "accuracy": 0.85, "labels": labels}


def test_the_advantage_of_a_thief_is_paired_with_scratch_by_seed() -> None:
    import thieves

    cells = [
        thief("pad", 1, [0.5, 0.7]),
        thief("from scratch", 0, [0.2, 0.4]),
        thief("pad", 0, [0.4]),
        thief("from scratch", 1, [0.5]),
    ]
    arms = thieves.summarize(cells)
    # Seed 0: 0.4 - 0.3; seed 1: 0.6 - 0.5.
    assert thieves.over(arms["pad"], arms["from scratch"], "1") == "+10.0 ± 0.0"


def test_arms_of_thieves_that_do_not_exist_are_refused() -> None:
    """A slip of the pen would run nothing and note in the results that it had been run again."""
    import thieves

    assert {cell.arm for cell in thieves.cells_of("lenet", "pad;norm")} == {"pad", "norm"}
    with pytest.raises(SystemExit, match="pads"):
        thieves.cells_of("lenet", "norm;pads")


def test_a_thief_tries_every_rate_on_the_first_draw_only() -> None:
    from types import SimpleNamespace

    import thieves
    import torch

    from fedkl.data.images import TensorImages

    torch.manual_seed(0)
    labels = torch.arange(3).repeat(700)
    pixels = (labels * 100).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 4, 4)
    images = TensorImages(pixels, labels, channels=1, image_size=4)
    bundle = SimpleNamespace(public=images, test=images)
    built: list[int] = []

    def net() -> torch.nn.Module:
        built.append(1)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))

    ways = dict.fromkeys(("as it is", "everything"), net)
    found = thieves._of(ways, bundle, 0, (1e-9, 0.05))["labels"]
    draws = {k: len(one["draws"]) for k, one in found.items()}
    assert draws == {"1": 5, "10": 2, "100": 1}
    assert len(built) == 3 * 3 + (4 + 1)  # three tries of each, and the further draws
    for one in found.values():
        assert one["way"] == "everything"
        assert one["rate"] == 0.05
        assert min(one["draws"]) > 0.9
    for draw in range(2):
        a, b = (thieves.drawn(images, 10, 0, d) for d in (draw, draw))
        assert torch.equal(a[0], b[0])
        assert a[1].bincount().tolist() == [10, 10, 10]


@pytest.mark.parametrize("arm", ["from scratch", "norm"])
def test_a_cell_of_thieves_loads_its_data_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    import thieves

    from fedkl.federation import session

    settings = {
        "federation": {"rounds": 1},
        "data": {"dataset": "digits", "image_size": 16, "channels": 1, "samples": 40},
        "training": {"local_steps": 1},
        "evaluation": {"images": 40},
    }
    loaded: list[Any] = []
    whole = session.load_data
    monkeypatch.setattr(session, "load_data", lambda config: loaded.append(0) or whole(config))
    monkeypatch.setattr("fedkl.federation.preflight.load_data", session.load_data)
    monkeypatch.setattr(thieves, "DRAWS", {1: 1})
    monkeypatch.setattr(thieves, "STEPS", 2)
    monkeypatch.setattr(thieves, "TEST_IMAGES", 40)
    part = thieves.Part(settings, ("from scratch", "norm"), (0.001,), 1, 1.0)
    monkeypatch.setitem(thieves.PARTS, "small", part)
    found = thieves.work("cell", (thieves.Cell("small", arm, 0), str(tmp_path)))
    assert 0 <= found["labels"]["1"]["draws"][0] <= 1
    assert len(loaded) == 1


def test_own_mixes_are_of_what_clients_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they seal their private layers, that is the mean, not what each kept."""
    from ownmix import on_own_mix

    from fedkl.federation import config_from, run
    from fedkl.federation.checkpoint import Checkpoints
    from fedkl.federation.client import Workspace
    from fedkl.federation.session import Session

    config = config_from(
        {
            "data": {"dataset": "digits", "image_size": 16, "channels": 1, "samples": 40},
            "model": {"name": "lenet"},
            "defense": {"name": "pad", "one_key": True},
            "federation": {"clients": 2, "rounds": 1, "seal_private": True},
            "evaluation": {"every": 0, "images": 20, "wrong_keys": 1},
        }
    )
    result = run(config, tmp_path)
    latest, _ = Checkpoints(tmp_path / "checkpoints").latest()
    assert latest is not None
    mean = Session(config, tmp_path).state(0, after=1, sealed=latest.facts["sealed"]).private
    assert mean is not None
    entered: list[Any] = []
    enter = Workspace.enter
    monkeypatch.setattr(Workspace, "enter", lambda *a: entered.append(a[3]) or enter(*a))
    assert len(on_own_mix(config, tmp_path, result.shared)) == 2
    assert len(entered) == 2
    assert all(private[n].equal(mean[n]) for private in entered for n in mean)


def test_pictures_show_the_committed_figures() -> None:
    import json
    import statistics

    import figures

    results = STUDIES.parent / "results"
    drawn = dict(figures.figures(results))
    assert {name for name in drawn if not (results / name).exists()} == set()
    replay = json.loads((results / "breakpad.json").read_text())["parts"]["replay"]["arms"]
    (line,) = [x for x in drawn["wears-off.png"].axes[0].lines if x.get_label() == "pad, LeNet"]
    best = [max(replay[f"lenet, pad, seed {seed}"]["shadow"]["2000"].values()) for seed in range(3)]
    assert line.get_xdata()[-1] == 2000
    assert line.get_ydata()[-1] == pytest.approx(statistics.fmean(best))
    relations = json.loads((results / "relations.json").read_text())
    related = relations["arms"]["lenet, pad"]
    sizes = statistics.fmean(one["shadow"]["1"]["size"] for one in related)
    dashed = [x for x in drawn["wears-off.png"].axes[0].lines if x.get_linestyle() == "--"]
    assert any(len(x.get_ydata()) and x.get_ydata()[0] == pytest.approx(sizes) for x in dashed)
    (dotted,) = [x for x in drawn["wears-off.png"].axes[0].lines if "at one" in x.get_label()]
    shapes = [one["shadow"]["weights"] for one in relations["shapes"]["lenet, pad, shape"]]
    pairs = [one["shadow"]["64"]["pairs"] for one in related]
    ends = [statistics.fmean(shapes), statistics.fmean(pairs)]
    assert [dotted.get_ydata()[0], dotted.get_ydata()[-1]] == pytest.approx(ends)
    assert [*dotted.get_xdata()] == [1, 2, 4, 16, 64]


def test_an_attacker_of_many_images_may_take_each_by_itself() -> None:
    import figures

    one = {"shadow": {"16": {"matched": 0.1, "candidates": 0.2}, "1": {"plain": 0.5},
                      "64": {"matched": 0.7, "candidates": 0.6}}}  # fmt: skip
    assert figures.curve([one, one], "shadow") == {1: [0.5] * 2, 16: [0.5] * 2, 64: [0.7] * 2}


def test_sizes_and_relations_are_tabled_by_way_and_controls_are_planned() -> None:
    import relations

    planned = relations.cells_of(None, None, 10).values()
    assert {cell.arm for cell in planned} == {*relations.KINDS, *relations.SHAPES}
    assert {cell.victims for cell in planned if cell.arm in relations.SHAPES} == {relations.MANY}
    assert len(relations.cells_of("lenet, pad", 2, 10)) == 2
    with pytest.raises(SystemExit, match="got arms"):
        relations.cells_of("lenet", None, 10)
    rates = {"1": {"size": 0.02}, "16": {"pairs": 0.05, "both": 0.08}}
    cells = [{"key": rates, "shadow": rates, "insider": rates, "shuffled": rates}] * 2
    alone = {
        who: {"size": 0.03, "weights": 0.02, "shape": 0.01} for who in ("key", "shadow", "insider")
    }
    document = {
        "victims": 10, "arms": {"lenet, pad": cells}, "shapes": {"lenet, pad, shape": [alone] * 2},
        "made": {
            "lenet, pad": {"command": "c", "commit": "a", "date": "2026-11-27"},
            "lenet, pad, shape": {"command": "d", "commit": "b", "date": "2026-12-01"},
        },
    }  # fmt: skip
    text = relations.markdown(document)
    first, second = text.splitlines()[2:4]
    assert first == "- lenet, pad, shape: `d` at commit b, 2026-12-01"
    assert second == "- lenet, pad: `c` at commit a, 2026-11-27"
    assert "| lenet, pad | insider | 3.0 ± 0.0 | 2.0 ± 0.0 | 1.0 ± 0.0 | 2 |" in text
    assert "| lenet, pad | shadow | 2.0 ± 0.0 | both | – | – | 8.0 ± 0.0 | – | 2 |" in text
    assert "| lenet, pad | shadow |  | pairs | – | – | 5.0 ± 0.0 | – | 2 |" in text


def test_a_shape_is_what_neither_size_nor_order_nor_signs_change() -> None:
    import shapes
    import torch

    generator = torch.Generator().manual_seed(0)
    gradient = {
        "w": torch.randn(3, 6, 4, 2, generator=generator),
        "b": torch.randn(3, 6, generator=generator),
    }
    sketch = shapes.ShapedSketch({n: t[0] for n, t in gradient.items()}, 16, generator)
    found = sketch(gradient)
    order = torch.randperm(6, generator=generator)
    moved = sketch({n: -7 * t[:, order] for n, t in gradient.items()})
    flat = torch.cat([t.flatten(1) for t in gradient.values()], dim=1)
    size = flat.double().norm(dim=1)
    torch.testing.assert_close(found[:, 0], size.log())
    behind = sketch.parts["shape"]
    torch.testing.assert_close(moved[:, behind], found[:, behind])
    assert float((found[0, behind] - found[1, behind]).abs().max()) > 0.1
    lies = found[:, sketch.parts["weights"]]
    for row, (name, tensor) in zip(lies.T, gradient.items(), strict=True):
        inner = (tensor.double() * tensor[0].double()).flatten(1).sum(dim=1)
        torch.testing.assert_close(row, (inner.abs() / size).log(), msg=name)
    larger = sketch({n: 7 * t for n, t in gradient.items()})
    torch.testing.assert_close(larger[:, 1:], found[:, 1:])


@pytest.mark.parametrize("shadows", [1, 4])
def test_shapes_find_who_agrees_with_what_the_shadows_expect(shadows: int) -> None:
    import shapes
    import torch

    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(500, 5, generator=generator)

    def client(noise: float) -> Any:
        return truth + noise * torch.randn(truth.shape, generator=generator)

    sides = torch.stack([client(0.1 * (shadows > 1)) for _ in range(shadows)])
    victims = client(0.1 * (shadows > 1))
    asked = torch.stack([torch.arange(40), *torch.randint(40, 500, (9, 40), generator=generator)])
    labels = torch.arange(500) % 2
    model = shapes.Shapes(sides[:, 40:], labels[40:])
    rows = sides.transpose(0, 1)[asked.T]
    scores = model.score(victims[:40], labels[:40], rows)
    assert float((scores.argmax(dim=1) == 0).double().mean()) > 0.9
    lost = model.score(victims[:40].roll(1, dims=0), labels[:40], rows)
    assert float((lost.argmax(dim=1) == 0).double().mean()) < 0.4


def small_cell(arm: str) -> Any:
    import baselines

    settings = {
        "data": {"dataset": "digits", "image_size": 16, "channels": 1, "samples": 100},
        "federation": {"rounds": 2},
        "evaluation": {"every": 0, "wrong_keys": 1, "wrong_key_images": 50},
        "defense": baselines.ARMS[arm],
    }
    return baselines.Cell(arm, 0, settings, victims=10, candidates=10, effort="quick")


def test_baselines_are_planned_with_one_federation_attacked_per_arm() -> None:
    import baselines

    cells = baselines.cells_of(3, 1_000)
    assert len({cell.name for cell in cells}) == len(cells) == 3 * len(baselines.ARMS)
    assert [c.arm for c in cells if c.victims] == list(baselines.ARMS)
    assert sum(cell.cost for cell in cells) / 2 <= 3600


@pytest.mark.parametrize("arm", ["norm", "norm+noise 0.01", "norm+prune 0.99", "pad"])
def test_a_baseline_is_attacked_and_its_control_finds_everything(arm: str, tmp_path: Path) -> None:
    import baselines

    found = baselines.work("cell", (small_cell(arm), str(tmp_path)))
    rates = {one["threat"]: one for one in found["identified"]}
    threats = {"pad": {"key-shared", "adaptive"}}
    assert rates.keys() == threats.get(arm, {"open"})
    held = rates["key-shared" if arm == "pad" else "open"]
    if "noise" not in arm:
        assert held["nearest"] == held["replay"] == 1.0
    arms = {arm: baselines.summarize([found])}
    document = {
        "command": "c",
        "commit": "0",
        "date": "d",
        "candidates": 10,
        "arms": json.loads(json.dumps(arms)),
    }
    text = baselines.markdown(document)
    assert f"| {arm} | {interval_of(found['own_key'])} |" in text
    assert f"| {arm} | {next(iter(rates))} |" in text


def interval_of(value: float) -> str:
    return f"{100 * value:.1f}"
