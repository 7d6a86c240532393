"""The command as a user meets it: help, bad input, previews, and what a run directory holds."""

import json
import os
import socket
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from e2e import command, profile_data, start_command, stub
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader
from pydantic import BaseModel

import servebench.launcher
from servebench.cli import main
from servebench.errors import ProfileError
from servebench.profile import Profile, bundled_profiles


def written(tmp_path: Path, **changes: Any) -> Path:
    """A valid profile file, with top-level sections replaced."""
    # A bound so wide that queries that a busy machine makes late do not void the run.
    data = profile_data(constraints=["p99 <= 500ms"], load={"target_qps": 100, "min_duration_s": 1})
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    return path


def one_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    assert line.startswith("servebench: error: ")
    return line


BAD_INPUT = [
    pytest.param(["--set", "load.qps=5"], "load.qps: unknown key; allowed here: target_qps, arrivals,", id="unknown key"),
    pytest.param(["--set", "laod.target_qps=5"], "laod: unknown key; did you mean load?", id="unknown section"),
    pytest.param(
        ["--set", "constraints=['p99 <= 50']"], "constraints: '50' is not a time; write a number with ns, us", id="no unit"
    ),
    pytest.param(["--set", "constraints=['p99 <= 50min']"], "unit 'min' is not a time", id="wrong unit"),
    pytest.param(["--set", "constraints=['p120 <= 5ms']"], "percentile 120 is not between 0 and 100", id="percentile 120"),
    pytest.param(["--set", "constraints=['p99 >= 5ms']"], "points the wrong way; allowed here: < and <=", id="wrong direction"),
    pytest.param(["--set", "constraints=['errors < 5']"], "'5' is not a share; write a percentage", id="no percent sign"),
    pytest.param(
        ["--set", "constraints=['p99 of 5']"], "is not a constraint; write for example: p99 <= 50ms", id="not a constraint"
    ),
    pytest.param(["--set", "constraints=[]"], "constraints: at least one promise is needed", id="no constraint"),
    pytest.param(
        ["--set", "load.target_qps=-1"], "load.target_qps: input should be greater than 0, found -1", id="negative rate"
    ),
    pytest.param(["--set", "load.target_qps=fast"], "load.target_qps: input should be a valid number", id="rate is a word"),
    pytest.param(["--set", "load.target_qps"], "write key.path=value", id="set without value"),
    pytest.param(["--set", "load.target_qps.x=1"], "'target_qps' holds a value, not a section", id="set below a value"),
    pytest.param(
        ["--set", "server.launch=vllm"], "no launcher called 'vllm'; installed: stub, torchserve, triton", id="unknown launcher"
    ),
    pytest.param(
        ["--set", "server.options.prot=1"], "server.options.prot: unknown key; did you mean port?", id="unknown option"
    ),
    pytest.param(["--set", "server.url=http://127.0.0.1:1"], "exactly one of launch", id="launch and url"),
    pytest.param(
        ["--set", "server={url: 'http://me:secret@127.0.0.1:1'}"], "url: holds a user or password", id="password in the url"
    ),
    pytest.param(["--set", "samples.source=npz"], "source 'npz' needs a path", id="source without path"),
    pytest.param(
        ["--set", "samples={source: npz, path: nowhere.npz}"],
        "nowhere.npz: no such file or directory",
        id="missing sample file",
    ),
    pytest.param(["--set", "endpoint.bearer_token_env=SB_NO_SUCH"], "SB_NO_SUCH is not set", id="token variable unset"),
    pytest.param(["--set", "client.cpus=[4096]"], "client.cpus: [4096] are not among the CPUs allowed", id="no such CPU"),
    pytest.param(["--set", "load.min_query_count=99999999999"], "load.min_query_count: input should be less", id="too many"),
    pytest.param(["--out", "taken"], "taken: is not empty; choose another directory", id="run directory exists"),
    pytest.param(["--out", "/proc/nowhere"], "/proc/nowhere: cannot be used for the run directory", id="unwritable"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_clear_line_and_nothing_starts(tmp_path: Path, arguments: list[str], message: str) -> None:
    path = written(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "run.json").write_text("precious")
    done = command("run", str(path), *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in one_line(done.stderr)
    assert done.stdout == ""
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["profile.yaml", "taken"], "nothing was left behind"
    assert (tmp_path / "taken" / "run.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("name: [", "not YAML", id="broken YAML"),
        pytest.param("- a\n- b\n", "a profile is a mapping of keys, found list", id="a list"),
        pytest.param(
            "name: x\nserver: {launch: stub}\n", "endpoint: required, but missing (and 2 more)", id="sections missing"
        ),
        pytest.param("name: a/b\n", "name: ", id="name with a slash"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    done = command("run", "broken.yaml", cwd=tmp_path)
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert line.startswith("servebench: error: broken.yaml: ")
    assert message in line


def test_an_unknown_profile_lists_the_bundled_ones(tmp_path: Path) -> None:
    done = command("run", "digits", cwd=tmp_path)
    assert done.returncode == 2
    message = "digits: no such file, and no bundled profile of that name; bundled: " + ", ".join(bundled_profiles())
    assert message in one_line(done.stderr)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with stub(tmp_path) as server:
        path = written(tmp_path, server={"url": server.urls["http"]}, endpoint={"model": "no/such"})
        done = command("run", str(path), "--out", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert f"endpoint.model: 'no/such' is not on the server at {server.urls['http']} (HTTP 404: " in one_line(
        "\n".join(line for line in done.stderr.splitlines() if "error" in line)
    )
    assert not (tmp_path / "run").exists()


def test_nobody_at_the_url(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = written(tmp_path, server={"url": f"http://127.0.0.1:{port}"})
    done = command("run", str(path), cwd=tmp_path)
    assert done.returncode == 1
    assert f"http://127.0.0.1:{port}: cannot be reached" in done.stderr
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_port_in_use_is_a_launch_error_with_the_servers_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = written(tmp_path, server={"launch": "stub", "options": {"port": port}})
        done = command("run", str(path), "--out", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert str(port) in done.stderr
    assert "in use" in done.stderr


def test_a_run_leaves_every_file_and_report_recomputes_them(tmp_path: Path) -> None:
    path = written(tmp_path)
    secret = ["--set", "endpoint.headers={X-Secret: hush-hush}"]
    done = command("run", str(path), "--out", "run", "--set", "load.min_query_count=700", *secret, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "run"
    names = {"profile.yaml", "run.json", "queries.parquet", "latency.hlog", "latency.hgrm", "environment.json", "facts.json"}
    assert {entry.name for entry in out.iterdir()} == names | {"server"}
    assert [entry.name for entry in (out / "server").iterdir()] == ["stub.log"]
    document = json.loads(done.stdout)
    assert document == json.loads((out / "run.json").read_text())
    schema = json.loads(resources.files(servebench).joinpath("judge/run.schema.json").read_text())
    jsonschema.validate(document, schema)
    assert (document["schema"], document["state"], document["verdict"]) == ("servebench.run/1", "complete", "PASS")

    # Secrets stay out, and the effective profile can be run again.
    assert not [file for file in out.rglob("*") if file.is_file() and b"hush-hush" in file.read_bytes()]
    effective = yaml.safe_load((out / "profile.yaml").read_text())
    assert effective["load"]["min_query_count"] == 700
    assert Profile.model_validate(effective).load.target_qps == 100

    # The latency files agree with the document, read by the hdrhistogram package.
    reader = HistogramLogReader(str(out / "latency.hlog"), HdrHistogram(1000, 3_600_000_000_000, 3))
    totals = {"": 0, "service": 0}
    while (interval := reader.get_next_interval_histogram()) is not None:
        totals[interval.get_tag() or ""] += interval.get_total_count()
    reader.close()
    assert totals == dict.fromkeys(totals, document["counts"]["ok"])

    for name in ("run.json", "latency.hlog", "latency.hgrm"):
        (out / name).rename(tmp_path / name)
    again = command("report", "run", cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout.startswith("PASS  p99 <= 50")
    for name in ("run.json", "latency.hlog", "latency.hgrm"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        pytest.param(lambda path: None, "no such directory", id="missing"),
        pytest.param(lambda path: path.write_text("{}"), "dir: is a file; give the run's directory: .", id="a file"),
        pytest.param(lambda path: path.mkdir(), "not a run directory: it has no facts.json", id="empty"),
        pytest.param(lambda path: (path.mkdir(), (path / "facts.json").write_text("{")), "cannot be read", id="broken facts"),
        pytest.param(
            lambda path: (path.mkdir(), (path / "facts.json").write_text('{"schema": "x"}')),
            "schema is 'x'",
            id="another schema",
        ),
    ],
)
def test_report_refuses_what_is_no_run(tmp_path: Path, prepare: Any, message: str) -> None:
    prepare(tmp_path / "dir")
    done = command("report", "dir", cwd=tmp_path)
    assert done.returncode == 2
    assert message in one_line(done.stderr)


def test_report_names_the_newest_of_several_runs(tmp_path: Path) -> None:
    for name, at_s in (("a", 2000), ("b", 3000), ("c", 1000)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "facts.json").write_text("{}")
        os.utime(tmp_path / "runs" / name / "facts.json", (at_s, at_s))
    done = command("report", "runs", cwd=tmp_path)
    assert done.returncode == 2
    assert one_line(done.stderr).endswith("runs: not a run directory, but one of runs; the newest is runs/b")


@pytest.mark.parametrize(
    ("launcher", "arguments", "message"),
    [
        pytest.param("triton", [], "--model: required; bundled profiles have: bert, delay, digits,", id="no model"),
        pytest.param("stub", ["--set", "max_batch=3"], "--set max_batch: unknown key; allowed here: service,", id="option"),
        pytest.param("stub", ["--set", "queue_limit=x"], "--set queue_limit: input should be a valid integer", id="value"),
    ],
)
def test_serve_refuses_bad_input_before_it_starts(tmp_path: Path, launcher: str, arguments: list[str], message: str) -> None:
    done = command("serve", launcher, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in one_line(done.stderr)


def test_options_that_a_launcher_refuses_are_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        class Options(BaseModel):
            size: int = 1

        def launch(self, model: str, options: Any, work_dir: Path) -> Any:
            raise ProfileError(f"size: {model} is smaller than {options.size}")

    monkeypatch.setattr(servebench.launcher, "launcher_names", lambda: ["refusing"])
    monkeypatch.setattr(servebench.launcher, "find_launcher", lambda name: Refusing())
    done = CliRunner().invoke(main, ["serve", "refusing", "--model", "m", "--set", "size=3"])
    assert done.exit_code == 2
    assert done.output.splitlines()[-1] == "servebench: error: --set size: m is smaller than 3"
    done = CliRunner().invoke(main, ["serve", "refusing"])  # a launcher that no bundled profile names
    assert (done.exit_code, done.output) == (2, "servebench: error: --model: required\n")


def test_schedule_counts_the_samples_of_files_and_needs_none_that_are_counted(tmp_path: Path) -> None:
    def previewed(*arguments: str) -> int:
        done = command("schedule", str(path), "--json", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        distinct: int = json.loads(done.stdout)["distinct_samples"]
        return distinct

    load = {"target_qps": 100, "min_duration_s": 0, "min_query_count": 5000}
    for source, name in (("npz", "x.npz"), ("npy", "npy"), ("files", "bodies")):
        endpoint = {"model": "m", "protocol": "torchserve-http"}
        path = written(tmp_path, samples={"source": source, "path": name}, endpoint=endpoint, load=load)
        assert previewed("--samples", "10") == 10
        done = command("schedule", str(path), cwd=tmp_path)
        assert done.returncode == 2 and name in one_line(done.stderr)
    np.savez(tmp_path / "x.npz", A=np.zeros((70, 3)), B=np.zeros(70))
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "A.npy", np.zeros((71, 3)))
    (tmp_path / "bodies").mkdir()
    for number in range(72):
        (tmp_path / "bodies" / str(number)).write_text("x")
    assert previewed() == 72
    for samples, expected in (
        ({"source": "npz", "path": "x.npz"}, 70),
        ({"source": "npz", "path": "x.npz", "batch_size": 4}, 18),  # the last one wraps round
        ({"source": "npy", "path": "npy"}, 71),
        ({"source": "random", "count": 73}, 73),
    ):
        path = written(tmp_path, samples=samples, load=load)
        assert previewed() == expected, samples
    path = written(tmp_path, samples={"source": "perf-analyzer", "path": "x.json"}, load=load)
    done = command("schedule", str(path), cwd=tmp_path)
    assert done.returncode == 2 and "give the size (--samples)" in one_line(done.stderr)
    assert previewed("--samples", "7") == 7


def test_schedule_previews_the_published_loadgen_run(tmp_path: Path) -> None:
    """16.5/s, MLPerf v5.1's seed, 600 s: a published submission log has 9997 queries over 600.035703410 s."""
    settings = ["load.target_qps=16.5", "load.schedule_seed=18209322760996052031", "load.min_duration_s=600"]
    done = command(
        "schedule", "stub", "--json", *(f"--set={setting}" for setting in [*settings, "load.min_query_count=100"]), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["planned"], document["generated_duration_ns"]) == (9997, 600_035_703_410)
    assert sum(point["qps"] for point in document["rate_over_time"]) / 20 == pytest.approx(
        9997 / (document["last_offset_ns"] / 1e9)
    )
    text = command("schedule", "stub", cwd=tmp_path).stdout
    assert "queries over" in text
    assert "sha256" in text


def test_the_profile_schema_accepts_the_bundled_profiles(tmp_path: Path) -> None:
    schema = json.loads(command("profile-schema", cwd=tmp_path).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in bundled_profiles().values():
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x"}, schema)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--help"], ["Exit codes", "servebench run digits-triton-http", "130"], id="servebench"),
        pytest.param(["run", "--help"], ["PROFILE", "--set", "--out", "--json"], id="run"),
        pytest.param(["serve", "--help"], ["stub", "triton"], id="serve"),
        pytest.param(["serve", "stub", "--help"], ["queue_limit", "service", "one beyond it gets status 503"], id="serve stub"),
    ],
)
def test_help_teaches(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0
    for word in words:
        assert word in done.stdout


def test_serve_keeps_a_server_up_until_interrupted(tmp_path: Path) -> None:
    process = start_command("serve", "stub", "--set", "service={kind: constant, mean_ms: 1}", cwd=tmp_path)
    try:
        assert process.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("Test it"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()
        url = next(line.split()[1] for line in lines if line.startswith("http"))
        path = written(tmp_path, server={"url": url})
        done = command("run", str(path), "--set", "load.min_query_count=700", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        process.send_signal(2)
        _, err = process.communicate(timeout=10)
    assert process.returncode in (0, 130), err
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))


def test_the_installed_package_finds_its_profiles_outside_the_checkout(tmp_path: Path) -> None:
    """A wheel, unpacked alone on the path, has the profiles, the models' data and the launchers."""
    root = Path(__file__).resolve().parent.parent
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, root],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("servebench-*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, site], check=True, timeout=60)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import servebench.profile as p, servebench.launcher as l\n"
        "profile = p.load_profile('digits-triton-http')\n"
        "print(p.__file__, profile.samples.path, profile.output_check.golden, *l.launcher_names())"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}\n" + code, site],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": ""},
    )
    module, samples, golden, *launchers = done.stdout.split()
    for path in (module, samples, golden):
        assert Path(path).is_relative_to(site), path
    assert launchers == ["stub", "torchserve", "triton"]
