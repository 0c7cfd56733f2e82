"""`dtrain simulate`: equal seeds give equal bytes, the worker loop is the real one, sweeps go on where they stopped."""

from __future__ import annotations

import io
import json
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sim_tools import corpus_of, only_run, simulated, write_file

from dtrain.compression.codec import Codec
from dtrain.experiments import sim_frontier, sim_jobs
from dtrain.experiments.attacks import ATTACKS
from dtrain.experiments.memory import MemoryExchange, MemorySwarm
from dtrain.experiments.results import FORMAT, ResultFolder
from dtrain.experiments.sim_file import RunSpec, load_sweep
from dtrain.experiments.sim_report import print_table, to_target, train_loss
from dtrain.experiments.sim_swarm import worker_name
from dtrain.trainer import cli
from dtrain.trainer.errors import UsageError
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.metrics import MetricsLog
from dtrain.trainer.model import GPT
from dtrain.trainer.settings import MachineSettings
from dtrain.trainer.worker import Worker


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    """Two simulations of one file write the same rounds and the same summary, overlap and churn included."""
    more = """
    [churn]
    joins_per_hour = 3000
    leaves_per_hour = 1500
    [exchange]
    overlap = "eager"
    """
    path = write_file(tmp_path, more)
    for name in ("one", "two"):
        assert cli.main(["simulate", str(path), "--out", str(tmp_path / name), "--jobs", "1"]) == 0
    run = only_run(path)
    for file in ("summary.json", f"runs/{run.id}/run.json", f"runs/{run.id}/rounds.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_the_simulator_has_no_training_loop_of_its_own(tmp_path: Path) -> None:
    """Workers in virtual time and workers in threads on the machine's clock end with the same theta."""
    spec = only_run(write_file(tmp_path))
    row, rounds = simulated(spec)
    assert row["digests_equal"] and row["contributors_mean"] == 3
    assert in_threads(spec, tmp_path) == {row["digest"]}
    assert [line["round"] for line in rounds] == [0, 1, 2, 3, 4]


def in_threads(spec: RunSpec, folder: Path) -> set[str]:
    torch.set_num_threads(1)
    swarm = MemorySwarm(
        spec.manifest, Codec(spec.manifest.codec, FlatParameters(GPT(spec.manifest.model)).shapes)
    )
    workers, logs = [], []
    for name in map(worker_name, range(spec.simulate.workers)):
        settings = MachineSettings(
            name, folder, "cpu", 1, max_rounds=spec.rounds, eval_every=0, checkpoint_every=0
        )
        logs.append(MetricsLog(folder / f"{name}.jsonl"))
        exchange = MemoryExchange(swarm, name)
        workers.append(
            Worker(spec.manifest, settings, exchange, logs[-1], lambda _: None, corpus=corpus_of(spec))
        )
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    for log in logs:
        log.close()
    return {worker.outer.digest.hex() for worker in workers}


def test_time_and_bytes_add_up(tmp_path: Path) -> None:
    """Virtual time is the inner steps' plus the exchanges'; bytes are those of the payloads."""
    spec = only_run(write_file(tmp_path, "[machines]\nstep_time_s = 2.0\n[network]\nprofile = 'dsl'\n"))
    row, rounds = simulated(spec)
    waited = sum(line["wait_s"] + line["exchange_s"] for line in rounds[1:])
    assert row["virtual_time_s"] == pytest.approx(12 * 2.0 + waited, rel=0.01)
    assert 0 < waited < 12
    assert row["compute_share"] == pytest.approx(24 / row["virtual_time_s"], rel=0.01)
    assert row["bytes_up_per_worker"] == pytest.approx(row["bytes_down_per_worker"])
    assert row["tokens"] == 3 * 12 * 2 * 32
    # Scatter: 2/3 of each payload. Gather: two copies of a span's union, which holds a third of three payloads.
    assert row["bytes_up_per_worker"] == pytest.approx(4 * row["payload_bytes"] * (2 / 3 + 2), rel=0.05)
    ring = 2 * (2 / 3) * 4 * row["num_params"] * 12
    assert row["ratio_vs_fp32_allreduce"] == pytest.approx(ring / row["bytes_up_per_worker"], rel=1e-3)
    per_step = row["bytes_up_per_worker"] / row["num_params"] / 12
    assert row["bytes_per_param_step"] == pytest.approx(per_step, rel=1e-3)
    assert rounds[-1]["eval_loss"] == row["eval_loss"] < rounds[0]["eval_loss"]


def test_time_to_a_loss_is_read_between_evaluations() -> None:
    """On a straight line between the two evaluations around it; a loss that was never reached has no time."""
    lines = [
        {"round": 0, "time_s": 0.0, "tokens": 0, "eval_loss": 5.0},
        {"round": 1, "time_s": 10.0, "tokens": 100, "eval_loss": None, "bytes_up_per_worker": 7.0},
        {"round": 2, "time_s": 20.0, "tokens": 200, "eval_loss": 3.0, "bytes_up_per_worker": 14.0},
        {"round": 3, "time_s": 30.0, "tokens": 300, "eval_loss": 2.0, "bytes_up_per_worker": 21.0},
    ]
    half = {"loss": 4.0, "tokens": 100, "time_s": 10.0, "bytes_up_per_worker": 7.0}
    assert to_target(4.0, lines) == {"to_target": half}
    assert to_target(2.5, lines)["to_target"]["time_s"] == 25.0
    assert to_target(5.5, lines)["to_target"]["time_s"] == 0.0
    assert to_target(1.0, lines) == {"to_target": None} and to_target(0.0, lines) == {}


def test_the_table_fits_a_plain_terminal(tmp_path: Path) -> None:
    """80 columns hold the widest figures that there are, the time to a loss among them; only labels are folded."""
    folder = ResultFolder(tmp_path / "out")
    folder.create()
    row = {"bytes_up_per_worker": 1.3e9, "virtual_time_s": 36_123.4, "compute_share": 1.0, "tokens": 2.4e7}
    row |= {"label": "diloco fp32, outer 0.7 mixed", "ratio_vs_fp32_allreduce": 12_345.67, "lost_sections": 0}
    row |= {"digests_equal": True, "to_target": {"time_s": 3456.7}, "train_loss": 1.1984}
    folder.write_summary({"format": FORMAT, "rows": [row | {"eval_loss": loss} for loss in (1.2345, 1.3)]})
    screen = io.StringIO()
    sweep = load_sweep(Path(__file__).parents[1] / "experiments" / "configs" / "links.toml")
    print_table(sweep, folder, {}, Console(file=screen, width=80))
    text = screen.getvalue()
    for words in ("1.267 ±0.033", "1.198", "1.30 GB", "12,346x", "10.0 h", "3,457 s", "100.0 %", "24.0M"):
        assert words in text, words
    assert "…" not in text


def test_the_training_loss_is_of_the_last_tenth() -> None:
    """Of 25 rounds the last two; of few rounds the last; nothing of a run that has only begun."""
    beginning = {"round": 0, "eval_loss": 5.0}
    lines = [beginning, *({"round": n, "loss": 4.0 - n / 10} for n in range(1, 26))]
    assert train_loss(lines) == {"train_loss": pytest.approx(1.55)}
    assert train_loss(lines[:4]) == {"train_loss": pytest.approx(3.7)}
    assert train_loss([beginning]) == {}


def test_the_frontier_is_the_gap_to_the_data_parallel_runs(tmp_path: Path) -> None:
    """Means over seeds, the gap to ddp with as many workers; a sweep without ddp shows losses."""
    common = {"workers": 4, "num_params": 1000}
    rows = [
        common | {"label": "ddp", "strategy": "ddp", "bytes_per_param_step": 6.0, "eval_loss": 2.0},
        common
        | {"label": "sparse", "strategy": "sparseloco", "bytes_per_param_step": 0.02, "eval_loss": 2.1},
        common
        | {"label": "sparse", "strategy": "sparseloco", "bytes_per_param_step": 0.04, "eval_loss": 2.3},
    ]
    found = {point.label: point for point in sim_frontier.points(rows)}
    assert found["sparse"].gap == pytest.approx(10.0) and found["sparse"].spread == pytest.approx(0.1)
    assert found["sparse"].bytes_per_param_step == pytest.approx(0.03) and found["ddp"].gap == 0
    assert [point.gap for point in sim_frontier.points(rows[1:])] == [None]
    assert sim_frontier.plot(list(found.values()), "a title", tmp_path).stat().st_size > 10_000


def test_unequal_machines_and_split_data(tmp_path: Path) -> None:
    """With a token target a machine of four times the speed does about four times the inner steps."""
    replaced = (("workers = 3", "workers = 2"), ("steps = 12", "steps = 60"))
    more = "[machines]\nspeeds = [4, 1]\n[exchange]\nround_tokens = 640\n"
    spec = only_run(write_file(tmp_path, more, replaced))
    row, _ = simulated(spec)
    assert 0.9 < row["tokens"] / (20 * 640) < 1.3
    assert row["digests_equal"]
    assert row["compute_share"] > 0.3
    split = only_run(write_file(tmp_path, more, (*replaced, ("[simulate]", "[simulate]\ndata = 'split'"))))
    assert split.id != spec.id and simulated(split)[0]["digest"] != row["digest"]


def test_matrix_products_in_bf16(tmp_path: Path) -> None:
    """They round otherwise and learn the same; the run is another one, and those in fp32 keep their names."""
    row, _ = simulated(only_run(write_file(tmp_path)))
    other, _ = simulated(only_run(write_file(tmp_path, "[machines]\nprecision = 'bf16'\n")))
    assert other["id"] != row["id"] == only_run(write_file(tmp_path, "[machines]\nprecision = 'fp32'\n")).id
    assert other["digest"] != row["digest"] and other["digests_equal"]
    assert other["eval_loss"] == pytest.approx(row["eval_loss"], rel=0.01)


def test_those_who_come_and_go_leave_one_theta(tmp_path: Path) -> None:
    """Joins, leaves and deaths change who is in a round; every round still ends with one theta."""
    churn = "[churn]\njoins_per_hour = 1500\nleaves_per_hour = 1500\n"
    row, rounds = simulated(only_run(write_file(tmp_path, churn, (("steps = 12", "steps = 30"),))))
    assert row["rounds"] == 10 and row["digests_equal"]
    assert len({line["contributors"] for line in rounds[1:]}) > 1


def test_what_comes_too_late_is_kept(tmp_path: Path) -> None:
    """Sections slower than the sender timeout are lost to the round, and the run goes on with one theta."""
    slow = "[network]\nup_mbps = 0.001\n[exchange]\nsender_timeout_s = 2.0\n"
    row, rounds = simulated(only_run(write_file(tmp_path, slow)))
    assert row["digests_equal"] and row["rounds"] == 4
    assert row["lost_sections"] == sum(line["lost_sections"] for line in rounds[1:]) == 4 * 3 * 2


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs are not repeated; the summary is the same as without the interruption."""
    path = write_file(
        tmp_path,
        '[grid]\ncodec.k = [64, 128]\nexchange.overlap = ["none", "eager"]\n',
        (("steps = 12", "steps = 3"),),
    )
    sweep, done = load_sweep(path), list[str]()
    assert [run.label for run in sweep.runs] == [
        f"k={k} overlap={overlap}" for k in (64, 128) for overlap in ("none", "eager")
    ]
    real = sim_jobs.simulate

    def stops_in_the_third(*args: object) -> object:
        done.append(args[0].id)  # type: ignore[attr-defined]
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    command = ["simulate", str(path), "--jobs", "1", "--out"]
    monkeypatch.setattr(sim_jobs, "simulate", stops_in_the_third)
    assert cli.main([*command, str(tmp_path / "a")]) == 130
    partial = ResultFolder(tmp_path / "a").summary()
    assert not partial["finished"] and [row["id"] for row in partial["rows"]] == done[:2]
    assert cli.main([*command, str(tmp_path / "a")]) == 0
    assert [*done[:2], *done[3:]] == [run.id for run in sweep.runs]
    monkeypatch.setattr(sim_jobs, "simulate", real)
    assert cli.main([*command, str(tmp_path / "b")]) == 0
    assert (tmp_path / "a/summary.json").read_bytes() == (tmp_path / "b/summary.json").read_bytes()
    for name in ("loss_tokens", "loss_bytes", "loss_time", "frontier"):
        assert (tmp_path / f"a/plots/{name}.png").stat().st_size > 10_000
        assert "<svg" in (tmp_path / f"a/plots/{name}.svg").read_text()


def test_processes_give_the_same_as_one(tmp_path: Path) -> None:
    """Runs in processes of their own end as they do in this one, and leave no process behind."""
    path = write_file(tmp_path)
    command = ["simulate", str(path), "--seeds", "2", "--out"]
    assert cli.main([*command, str(tmp_path / "two"), "--jobs", "2"]) == 0
    assert cli.main([*command, str(tmp_path / "one"), "--jobs", "1"]) == 0
    assert (tmp_path / "one/summary.json").read_bytes() == (tmp_path / "two/summary.json").read_bytes()
    rows = json.loads((tmp_path / "one/summary.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["digest"] != rows[1]["digest"] and rows[0]["label"] == rows[1]["label"]


def test_an_interruption_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are killed in the midst of a run cannot clean up after themselves: who began them does."""
    scratch, seen = tmp_path / "scratch", list[Path]()
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    path = write_file(tmp_path)
    sweep = load_sweep(path, seeds=2)

    def interrupts(event: object) -> None:
        seen.extend(scratch.rglob("dtrain-sim-*"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sim_jobs.run_all(sweep, path, 2, ResultFolder(tmp_path / "out"), sweep.runs, 2, interrupts)
    assert seen and not list(scratch.iterdir())


def test_a_run_that_fails_does_not_end_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A diverged run is reported with its reason; the others' rows are there, and the exit code is 1."""
    path = write_file(tmp_path, "[grid]\ntrain.lr = [1e30, 1e-3]\n")
    assert cli.main(["simulate", str(path), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 1
    summary = ResultFolder(tmp_path / "out").summary()
    assert [row["settings"]["train.lr"] for row in summary["rows"]] == [1e-3]
    (reason,) = summary["runs_failed"].values()
    assert "\n" not in reason and reason in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("more", "replaced", "words"),
    [
        ("[simulat]\n", (), "unknown setting simulat (did you mean simulate?)"),
        ("[network]\nprofle = 'dsl'\n", (), "unknown setting network.profle (did you mean profile?)"),
        ("[network]\nprofile = 'adsl'\n", (), "network.profile must be one of datacenter"),
        ("[network]\nloss = 0.9\n", (), "network.loss must be a number from 0 to 0.5, not 0.9"),
        ("[machines]\nspeeds = [1, 0]\n", (), "machines.speeds must be a list of numbers above 0"),
        ("[machines]\nprecision = 'fp16'\n", (), "machines.precision must be one of fp32, bf16"),
        ("[churn]\ncrash_share = 2\n", (), "churn.crash_share must be between 0 and 1"),
        ("[grid]\ncodec.q = [1]\n", (), "unknown setting codec.q"),
        ("[grid]\ncodec.k = 64\n", (), "grid: codec.k must be a list of values to try"),
        ("[grid]\ncodec.k = [0]\n", (), "codec: k must be a whole number from 1 to 4096, not 0"),
        ("[grid]\ncodec.k = [64, 64]\n", (), "comes twice"),
        ("[[variants]]\ncodec.k = 64\n", (), "variants.label must be the variant's name"),
        ("[strategy]\nname = 'sgd'\n", (), "strategy.name"),
        ("", (("steps = 12", "steps = 10"),), "simulate.steps must be a multiple of train.inner_steps = 3"),
        ("", (("workers = 3", "workers = 0"),), "simulate.workers must be at least 1, not 0"),
        ("", (("[data]", "[data]\nfile = 'nowhere.txt'"),), "cannot read the text"),
        ("", (('name = "tiny"', 'name = "a b"'),), "name must be 1 to 64 letters"),
        ("", (("[data]", "[data"),), "is no valid TOML"),
    ],
)
def test_a_bad_file_is_one_line(
    more: str,
    replaced: tuple[tuple[str, str], ...],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unknown keys, impossible values and missing data: one line that names the file and the key, exit code 2."""
    path = write_file(tmp_path, more, replaced)
    assert cli.main(["simulate", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and str(path) in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(UsageError, match=r"nowhere\.toml: No such file"):
        load_sweep(tmp_path / "nowhere.toml")


def test_attackers_are_put_out_and_training_goes_on(tmp_path: Path) -> None:
    """Two of nine push against the others: out after three rounds, and the loss is nearly that of those left."""
    more = "[attack]\nkind = 'sign-flip'\nattackers = 2\naudits = true\n"
    many = (("workers = 3", "workers = 9"), ("steps = 12", "steps = 18"))
    row, rounds = simulated(only_run(write_file(tmp_path, more, many)))
    assert (row["attackers_out"], row["attackers_out_by_round"], row["attackers_out_for"]) == (
        2,
        3,
        ["against"],
    )
    assert row["honest_out_rounds"] == 0 and row["honest_rounds"] == 7 * 6 and row["digests_equal"]
    assert [line["contributors"] for line in rounds[4:]] == [7] * 3
    undefended, _ = simulated(only_run(write_file(tmp_path, more + "[exchange]\nscreens = false\n", many)))
    assert undefended["attackers_out"] == 0 and undefended["contributors_mean"] == 9
    assert row["eval_loss"] < undefended["eval_loss"]


def test_who_was_put_out_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each label that had hostile members, also where the first had none."""
    variants = "[[variants]]\nlabel = 'clean'\n[[variants]]\nlabel = 'hostile'\n"
    attack = "attack = { kind = 'zero', attackers = 1, audits = true }\n"
    path = write_file(tmp_path, variants + attack, (("workers = 3", "workers = 6"),))
    assert cli.main(["simulate", str(path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("Put out:") == 1 and "Put out: hostile: 1 by round 3 (empty); 0 of 20 honest" in said


@pytest.mark.parametrize("kind", ATTACKS)
def test_every_attack_holds_to_the_wire(kind: str, tmp_path: Path) -> None:
    """Each kind does something, and honest workers end with one theta whatever it is."""
    more = f"[attack]\nkind = '{kind}'\nattackers = 2\n"
    many = (("workers = 3", "workers = 7"), ("steps = 12", "steps = 9"))
    clean, _ = simulated(only_run(write_file(tmp_path, "", many)))
    row, _ = simulated(only_run(write_file(tmp_path, more, many)))
    assert row["digests_equal"] and row["rounds"] == 3
    assert row["digest"] != clean["digest"] or kind == "boast"  # which changes nothing but the time
