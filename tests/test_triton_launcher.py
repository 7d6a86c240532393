"""The Triton launcher: its checks on made-up machines, its life cycle on a scripted and on the real server."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from launchers import HELDOUT, refusal
from numpy.typing import NDArray
from processes import alive, children, family
from pydantic import ValidationError
from servebench_servers import triton, triton_install
from servebench_servers.host import choose_ports
from servebench_servers.models.digits import DIGITS
from servebench_servers.triton import TritonLauncher, TritonOptions, server_command
from servebench_servers.triton_server import TritonServer, failure_cause

from servebench.errors import LaunchError
from servebench.launcher import find_launcher

MIB = 1024 * 1024
STUB = triton_install.STUB_NAME
HAS_WHEEL = importlib.util.find_spec("pytriton") is not None
needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="needs the nvidia-pytriton wheel")


# ---- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"max_batch_size": 0}, "greater than or equal to 1", id="no batch at all"),
        pytest.param({"batching": True}, "Extra inputs", id="unknown key"),
        pytest.param(
            {"max_batch_size": 8, "dynamic_batching": {"preferred_batch_size": [4, 64]}},
            "goes beyond max_batch_size 8",
            id="a preferred size that never fits",
        ),
        pytest.param({"http_port": 9000, "metrics_port": 9000}, "must differ", id="one port twice"),
        pytest.param({"weights": "no/such/file"}, "not point to a file", id="weights that are not there"),
        pytest.param({"cpus": []}, "at least 1", id="no CPU"),
    ],
)
def test_options_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TritonOptions.model_validate(settings)


def test_every_option_is_documented() -> None:
    assert all(field.description for field in TritonOptions.model_fields.values())


def test_the_entry_point_is_this_launcher() -> None:
    launcher = find_launcher("triton")
    assert isinstance(launcher, TritonLauncher)
    assert launcher.Options is TritonOptions


# ---- checks before anything starts ---------------------------------------------------------


def test_unknown_model_lists_the_known_ones(tmp_path: Path) -> None:
    text = refusal(lambda: TritonLauncher().launch("resnet", TritonOptions(), tmp_path))
    assert "'resnet'" in text and "known: bert, delay, digits" in text


def make_wheel(site_packages: Path, *versions: str) -> Path:
    for version in versions:
        stub = site_packages / "pytriton" / "tritonserver" / "python_backend_stubs" / version / STUB
        stub.parent.mkdir(parents=True)
        stub.touch()
    backend = site_packages / "pytriton" / "tritonserver" / "backends" / "python"
    (backend / "__pycache__").mkdir(parents=True)
    (backend / "libtriton_python.so").write_text("library")
    return site_packages


def test_wheel_missing() -> None:
    assert "pip install 'servebench[triton]'" in refusal(lambda: triton_install.wheel_installation(None, (3, 11)))


def test_wheel_without_a_stub_for_this_python_names_those_it_has(tmp_path: Path) -> None:
    make_wheel(tmp_path, "3.9", "3.12", "3.11")
    text = refusal(lambda: triton_install.wheel_installation(tmp_path, (3, 15)))
    assert "Python 3.15" in text and "one of: 3.9, 3.11, 3.12" in text


def test_wheel_is_linked_into_the_work_directory_and_stays_as_it_is(tmp_path: Path) -> None:
    site_packages = make_wheel(tmp_path / "site", "3.11")
    installation = triton_install.wheel_installation(site_packages, (3, 11))
    for _ in range(2):  # the second time over what the first left
        backends = installation.backend_directory(tmp_path / "work")
        assert sorted(path.name for path in (backends / "python").iterdir()) == ["libtriton_python.so", STUB]
        assert (backends / "python" / STUB).resolve() == installation.stub
    assert not (installation.python_backend / STUB).exists()


def test_environment_puts_this_interpreter_and_the_wheels_libraries_first(tmp_path: Path) -> None:
    installation = triton_install.wheel_installation(make_wheel(tmp_path, "3.11"), (3, 11))
    env = installation.environment({"PATH": "/elsewhere", "LD_LIBRARY_PATH": "/mine", "KEPT": "yes"})
    assert env["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/elsewhere"]
    libraries = env["LD_LIBRARY_PATH"].split(os.pathsep)
    assert libraries[0] == str(tmp_path / "nvidia_pytriton.libs") and libraries[-1] == "/mine"
    assert env["KEPT"] == "yes"


def make_triton(root: Path, script: str, stub: bytes | None = b"#!/bin/sh\n") -> Path:
    """A tritonserver in the usual layout; the program is a script."""
    server = root / "bin" / "tritonserver"
    server.parent.mkdir(parents=True)
    server.write_text(script)
    server.chmod(0o755)
    if stub is not None:
        path = root / "backends" / "python" / STUB
        path.parent.mkdir(parents=True)
        path.write_bytes(stub)
        path.chmod(0o755)
    return server


def test_binary_from_a_path_or_the_search_path(tmp_path: Path) -> None:
    server = make_triton(tmp_path, "#!/bin/sh\n", stub=b"\x7fELF...libpython3.11.so.1.0\0")
    for binary in (str(server), "PATH"):
        installation = triton_install.binary_installation(binary, (3, 11), str(server.parent))
        assert installation.server == server
        assert installation.backend_directory(tmp_path / "work") == tmp_path / "backends"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("binary", "stub", "expected"),
    [
        pytest.param("PATH", b"", "no tritonserver on the PATH", id="none on the PATH"),
        pytest.param("/no/tritonserver", b"", "/no/tritonserver: no such program", id="no such file"),
        pytest.param(None, None, "has no Python backend", id="built without the Python backend"),
        pytest.param(
            None, b"..libpython3.8.so.1.0..", "is for Python 3.8; run servebench with that, not 3.11", id="other Python"
        ),
    ],
)
def test_binary_refused(tmp_path: Path, binary: str | None, stub: bytes | None, expected: str) -> None:
    server = make_triton(tmp_path, "#!/bin/sh\n", stub)
    assert expected in refusal(lambda: triton_install.binary_installation(binary or str(server), (3, 11), "/nowhere"))


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        pytest.param(
            lambda: triton_install.check_glibc("glibc 2.31", (2, 35)),
            "needs glibc 2.35 or newer, found glibc 2.31",
            id="old glibc",
        ),
        pytest.param(
            lambda: triton_install.check_glibc("glibc 2.9", (2, 35)), "found glibc 2.9", id="versions are not decimals"
        ),
        pytest.param(lambda: triton_install.check_glibc(None, (2, 35)), "found another C library", id="not glibc"),
        pytest.param(lambda: triton_install.check_numpy("2.4.6"), "pip install 'numpy<2'", id="numpy 2"),
        pytest.param(lambda: triton_install.check_numpy("10.0"), "numpy 10.0 silently corrupts", id="numpy 10"),
        pytest.param(lambda: triton_install.check_torch(None), "pip install 'servebench[triton]'", id="no torch"),
        pytest.param(
            lambda: triton_install.check_libraries(
                "\tlinux-vdso.so.1 (0x7f07)\n\tlibpython3.11.so.1.0 => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x7f07)\n"
            ),
            "libpython3.11.so.1.0 is not found: this Python was built without a shared library",
            id="static Python",
        ),
        pytest.param(
            lambda: triton_install.check_libraries(
                "\tlibb.so.2 => not found\n\tliba.so.1 => not found\n\tliba.so.1 => not found\n"
            ),
            "needs liba.so.1, libb.so.2;",
            id="other libraries",
        ),
        pytest.param(lambda: triton_install.check_shm(None, MIB), "needs /dev/shm", id="no /dev/shm"),
        pytest.param(
            lambda: triton_install.check_shm(64 * MIB, 64 * MIB + 1),
            "has 64 MiB free, Triton needs 65 MiB",
            id="docker's small /dev/shm",
        ),
    ],
)
def test_machine_refused(check: Callable[[], None], expected: str) -> None:
    assert expected in refusal(check)


def test_machine_accepted() -> None:
    triton_install.check_glibc("glibc 2.35", (2, 35))
    triton_install.check_glibc("glibc 3.0", (2, 35))
    triton_install.check_numpy("1.26.4")
    triton_install.check_torch("2.13.0+cpu")
    triton_install.check_libraries(
        "\tlibpython3.11.so.1.0 => /opt/lib/libpython3.11.so.1.0 (0x00007f07)\n\t/lib64/ld.so (0x7f)\n"
    )
    triton_install.check_shm(64 * MIB, 64 * MIB)


def test_shared_memory_grows_by_whole_mebibytes_per_instance() -> None:
    assert triton_install.shm_needed_bytes(4, 1) == 4 * 2 * MIB
    assert triton_install.shm_needed_bytes(1, 10 * MIB + 1) == 12 * MIB


@needs_wheel
def test_the_loader_finds_the_stubs_libraries_only_in_the_prepared_environment(tmp_path: Path) -> None:
    installation = triton_install.find_installation(None)
    stub = Path(shutil.copy(installation.stub, tmp_path))  # away from the wheel, as its links are
    bare = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    triton_install.check_libraries(triton_install.trace_libraries(stub, installation.environment(bare)))
    assert "libcudart" in refusal(lambda: triton_install.check_libraries(triton_install.trace_libraries(stub, bare)))


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = refusal(lambda: choose_ports({"http": 0, "grpc": port}))
    assert f"grpc_port: 127.0.0.1:{port} is in use" in text


def test_free_ports_are_distinct_and_wanted_ones_kept() -> None:
    wanted = choose_ports({"http": 0})["http"]
    ports = choose_ports({"http": wanted, "grpc": 0, "metrics": 0})
    assert ports["http"] == wanted and 0 not in ports.values() and len(set(ports.values())) == 3


def test_http_threads_are_passed_only_when_asked_for() -> None:
    def command(threads: int | None) -> list[str]:
        ports = {"http": 1, "grpc": 2, "metrics": 3}
        return server_command(Path("t"), Path("r"), Path("b"), "digits", ports, "prefix", threads)

    assert set(command(3)) - set(command(None)) == {"--http-thread-count=3"}


# ---- why it did not start ------------------------------------------------------------------

GPU_NOISE = 'E1122 03:58:21.430066 9624 server.cc:241] "CudaDriverHelper has not been initialized."\n'


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        pytest.param("", "", id="silent"),
        pytest.param(
            GPU_NOISE + 'I1122 03:58:21.4 9624 m.cc:4] "loading"\n', "", id="no error but the one of every CPU machine"
        ),
        pytest.param(
            GPU_NOISE
            + 'E1122 03:58:23.7 9683 backend_model.cc:692] "ERROR: SystemExit: 3\\n\\nAt:\\n  model.py(1)"\n'
            + "E1122 03:58:23.761596 9683 model_lifecycle.cc:642] "
            + "\"failed to load 'digits' version 1: Internal: SystemExit: 3\\n\\nAt:\\n  model.py(1)\\n\"\n"
            + 'I1122 03:58:23.761612 9683 model_lifecycle.cc:777] "failed to load"\n'
            + "error: creating server: Invalid argument - load failed\n",
            "failed to load 'digits' version 1: Internal: SystemExit: 3",
            id="the outermost error, without its traceback",
        ),
        pytest.param(
            "E1122 03:58:22.408153868    9624 chttp2_server.cc:1060]     UNKNOWN:No address added\n"
            "E1122 03:58:22.411882 9624 main.cc:245] "
            "\"failed to start GRPC service: Unavailable - Socket '127.0.0.1:18001' already in use \"\n",
            "failed to start GRPC service: Unavailable - Socket '127.0.0.1:18001' already in use",
            id="a port taken meanwhile",
        ),
        pytest.param(
            GPU_NOISE + "+---+\n| x |\n+---+\ntritonserver: error while loading shared libraries: libz.so.1: cannot open\n\n",
            "tritonserver: error while loading shared libraries: libz.so.1: cannot open",
            id="the loader speaks",
        ),
    ],
)
def test_cause_of_a_failed_start(log: str, cause: str) -> None:
    assert failure_cause(log) == cause


# ---- the launcher, on a scripted server ----------------------------------------------------

SCRIPTED = f"""#!{sys.executable}
import http.server, json, sys
port = next(int(a.split("=")[1]) for a in sys.argv if a.startswith("--http-port="))
config = {{"max_batch_size": BATCH, "instance_group": [{{"kind": "KIND_CPU", "count": 1}}]}}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(config if self.path.endswith("/config") else {{"version": "9.9"}}).encode()
        self.send_response(READY if self.path.endswith("/ready") else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
print('E0101 00:00:00.0 1 main.cc:1] "something is wrong"', flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TritonServer]:
    monkeypatch.setattr(triton, "check_machine", lambda *args, **kwargs: None)

    def launch(script: str, **options: Any) -> TritonServer:
        server = make_triton(tmp_path / "triton", script)
        return TritonLauncher().launch("digits", TritonOptions(binary=str(server), **options), tmp_path / "work")

    return launch


def test_scripted_server_that_is_ready(scripted: Callable[..., TritonServer]) -> None:
    server = scripted(SCRIPTED.replace("BATCH", "16").replace("READY", "200"))
    try:
        assert server.describe()["version"] == "9.9"
        assert server.exit_code() is None
    finally:
        server.stop()
    assert server.exit_code() is not None and not children()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param(
            SCRIPTED.replace("BATCH", "4").replace("READY", "200"),
            "max_batch_size is 4, asked for 16",
            id="changed what was asked",
        ),
        pytest.param(
            SCRIPTED.replace("BATCH", "16").replace("READY", "400"),
            "triton was not ready within 0.5 s: something is wrong",
            id="never ready",
        ),
        pytest.param(
            "#!/bin/sh\necho no more luck; exit 3\n", "triton ended (exit code 3) before it was ready: no more luck", id="ends"
        ),
    ],
)
def test_scripted_server_that_fails_is_ended(scripted: Callable[..., TritonServer], script: str, expected: str) -> None:
    before = children()
    with pytest.raises(LaunchError) as caught:
        scripted(script, startup_timeout_s=0.5)
    assert expected in str(caught.value)
    assert caught.value.log_tail != ""
    assert children() == before


# ---- TorchScript ---------------------------------------------------------------------------


def launch_torchscript(work: Path, **options: Any) -> TritonServer:
    return TritonLauncher().launch("digits", TritonOptions(backend="torchscript", device="cpu", **options), work)


def test_torchscript_needs_the_backend_before_anything_is_written(tmp_path: Path) -> None:
    server = make_triton(tmp_path / "triton", "#!/bin/sh\nexit 1\n")
    text = refusal(lambda: launch_torchscript(tmp_path / "work", binary=str(server)))
    library = tmp_path / "triton" / "backends" / "pytorch" / "libtriton_pytorch.so"
    assert text.startswith(f"backend: {server} has no PyTorch backend ({library} is missing); use container")
    assert not (tmp_path / "work").exists()
    text = refusal(lambda: launch_torchscript(tmp_path / "work", binary="/no/tritonserver"))
    assert text.startswith("/no/tritonserver: no such program")


@needs_wheel
def test_the_wheel_has_no_torchscript(tmp_path: Path) -> None:
    server = triton_install.find_installation(None).server
    text = refusal(lambda: launch_torchscript(tmp_path / "work"))
    assert text.startswith(f"backend: {server} has no PyTorch backend (") and text.endswith("or backend: python")
    assert not (tmp_path / "work").exists()


def test_no_triton_at_all_has_no_torchscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "none is installed; use container" in refusal(lambda: launch_torchscript(tmp_path / "work"))


def test_torchscript_on_a_full_triton(tmp_path: Path) -> None:
    """The server is a script; what it would load is the network, and its backends are looked for in the installation."""
    torch = pytest.importorskip("torch")
    script = SCRIPTED.replace("BATCH", "16").replace("READY", "200")
    binary = make_triton(tmp_path / "triton", script, stub=None)  # needs no Python backend
    library = tmp_path / "triton" / "backends" / "pytorch" / "libtriton_pytorch.so"
    library.parent.mkdir(parents=True)
    library.touch()
    server = launch_torchscript(tmp_path / "work", binary=str(binary))
    try:
        facts = json.loads(json.dumps(server.describe()))
    finally:
        server.stop()
    assert f"--backend-directory={tmp_path / 'triton' / 'backends'}" in facts["command"]
    assert (facts["backend"], facts["distribution"], facts["torch"]) == ("torchscript", str(binary), "the backend's own")
    assert facts["traced_by_torch"] == torch.__version__
    assert facts["weights"]["sha256"] == hashlib.sha256(DIGITS.weights_path.read_bytes()).hexdigest()
    assert 'backend: "pytorch"' in facts["config"] and 'backend: "pytorch"' in server.config_files()[0].read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
        network = torch.jit.load(tmp_path / "work" / "model_repository" / "digits" / "1" / "model.pt")
    for rows in (1, 16):
        with torch.inference_mode():
            logits = network(torch.from_numpy(HELDOUT["IMAGE"][:rows])).numpy()
        np.testing.assert_allclose(logits, HELDOUT["LOGITS"][:rows], rtol=1e-3, atol=1e-4)


# ---- the real server -----------------------------------------------------------------------


def shm_regions(server: TritonServer | None = None) -> list[Path]:
    """Shared memory of one server, or of all that this process started."""
    prefix = f"servebench-{os.getpid()}-"
    if server is not None:
        argument = next(text for text in server.describe()["command"] if "shm-region-prefix-name=" in text)
        prefix = argument.partition("shm-region-prefix-name=")[2]
    return sorted(Path("/dev/shm").glob(f"{prefix}*"))


def client_of(server: TritonServer) -> Any:
    tritonclient = pytest.importorskip("tritonclient.http")
    return tritonclient.InferenceServerClient(server.urls["http"].removeprefix("http://"))


def infer(client: Any, images: NDArray[Any]) -> NDArray[Any]:
    from tritonclient.http import InferInput

    tensor = InferInput("IMAGE", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    logits: NDArray[Any] = client.infer("digits", [tensor]).as_numpy("LOGITS")
    return logits


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    options = TritonOptions(dynamic_batching={"max_queue_delay_us": 20_000})
    running = TritonLauncher().launch("digits", options, tmp_path_factory.mktemp("triton"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Any]:
    with client_of(server) as connected:
        yield connected


@needs_wheel
@pytest.mark.triton
def test_one_held_out_image(client: Any) -> None:
    logits = infer(client, HELDOUT["IMAGE"][7:8])
    assert logits.shape == (1, 10)
    assert logits.argmax() == HELDOUT["LOGITS"][7].argmax()
    np.testing.assert_allclose(logits, HELDOUT["LOGITS"][7:8], rtol=1e-3, atol=1e-4)


@needs_wheel
@pytest.mark.triton
def test_all_held_out_images_in_batches_of_16(client: Any) -> None:
    logits = np.concatenate([infer(client, HELDOUT["IMAGE"][start : start + 16]) for start in range(0, 360, 16)])
    np.testing.assert_allclose(logits, HELDOUT["LOGITS"], rtol=1e-3, atol=1e-4)
    assert (logits.argmax(axis=1) == HELDOUT["LABEL"]).mean() > 0.97


@needs_wheel
@pytest.mark.triton
def test_concurrent_requests_are_joined_and_each_gets_its_own_answer(server: TritonServer, client: Any) -> None:
    def statistics() -> dict[str, Any]:
        numbers: dict[str, Any] = client.get_inference_statistics("digits")["model_stats"][0]
        return numbers

    def three_rows(first: int) -> NDArray[Any]:
        with client_of(server) as own:  # tritonclient's are for one thread each
            return np.concatenate([infer(own, HELDOUT["IMAGE"][row : row + 1]) for row in range(first, first + 3)])

    before = statistics()
    with ThreadPoolExecutor(16) as threads:
        answers = np.concatenate(list(threads.map(three_rows, range(0, 48, 3))))
    after = statistics()
    np.testing.assert_allclose(answers, HELDOUT["LOGITS"][:48], rtol=1e-3, atol=1e-4)
    assert after["inference_count"] - before["inference_count"] == 48
    assert after["execution_count"] - before["execution_count"] < 24  # 3 if all sixteen are in step


@needs_wheel
@pytest.mark.triton
def test_description_agrees_with_the_server_and_the_files(server: TritonServer, client: Any) -> None:
    facts = json.loads(json.dumps(server.describe()))
    assert facts["version"] == client.get_server_metadata()["version"]
    assert facts["weights"]["origin"] == "shipped, trained on scikit-learn digits, seed 2026"
    assert facts["weights"]["sha256"] == hashlib.sha256(DIGITS.weights_path.read_bytes()).hexdigest()
    assert [path.read_text() for path in server.config_files()] == [facts["config"]]
    assert client.get_model_config("digits")["dynamic_batching"]["max_queue_delay_microseconds"] == 20_000
    # The log line is the instance's own: torch and numpy are what it runs, not what we believe.
    assert (
        f"torch {facts['torch']} on cpu in fp32 with 1 thread(s), numpy {facts['numpy']}, Python environment {sys.prefix}"
        in server.log_path.read_text()
    )


@needs_wheel
@pytest.mark.triton
def test_listens_on_loopback_only(server: TritonServer) -> None:
    listening = [c.laddr for p in family(server) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.port for address in listening} == {int(url.split(":")[2].split("/")[0]) for url in server.urls.values()}
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


@needs_wheel
@pytest.mark.triton
def test_a_second_server_from_another_installation_and_its_end(
    server: TritonServer, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = triton_install.find_installation(None)
    binary = make_triton(tmp_path, f'#!/bin/sh\nexec {wheel.server} "$@"\n', wheel.stub.read_bytes())
    for source in wheel.python_backend.glob("*triton_python*"):
        shutil.copy(source, tmp_path / "backends" / "python")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(wheel.library_dirs[0]))
    cpu = min(os.sched_getaffinity(0))
    options = TritonOptions(binary=str(binary), max_batch_size=4, cpus=[cpu])
    second = TritonLauncher().launch("digits", options, tmp_path / "work")
    try:
        with client_of(second) as other:
            np.testing.assert_allclose(infer(other, HELDOUT["IMAGE"][:4]), HELDOUT["LOGITS"][:4], rtol=1e-3, atol=1e-4)
            assert "dynamic_batching" not in other.get_model_config("digits")
        members = family(second)
        assert len(members) == 2 and all(member.cpu_affinity() == [cpu] for member in members)
        assert len(shm_regions(second)) == 1
    finally:
        second.stop()
    assert second.exit_code() == 0
    assert not any(alive(member) for member in members)
    assert shm_regions(second) == []
    choose_ports({name: int(url.split(":")[2].split("/")[0]) for name, url in second.urls.items()})  # all free again
    second.stop()
    assert infer(client, HELDOUT["IMAGE"][:1]).shape == (1, 10)  # the first is untouched
    assert len(shm_regions(server)) == 1


@needs_wheel
@pytest.mark.triton
def test_corrupt_weights_fail_the_launch_and_leave_nothing(tmp_path: Path) -> None:
    before, regions = children(), shm_regions()
    weights = tmp_path / "mine.pt"
    weights.write_bytes(b"not weights at all")
    started_s = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        TritonLauncher().launch("digits", TritonOptions(weights=weights, startup_timeout_s=30), tmp_path / "work")
    assert time.monotonic() - started_s < 30
    assert "before it was ready: failed to load 'digits'" in str(caught.value)
    assert "does not hold the digits network's weights" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "does not hold the digits network's weights" in caught.value.log_tail
    assert children() == before
    assert shm_regions() == regions


@needs_wheel
@pytest.mark.triton
def test_weights_of_the_hub_cache_are_what_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    network = importlib.import_module("servebench_servers.models.digits.network").build().eval()
    snapshot = tmp_path / "hub" / "models--me--my-digits" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    torch.save(network.state_dict(), snapshot / "pytorch_model.bin")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("c0ffee")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    server = TritonLauncher().launch("digits", TritonOptions(weights_hub="me/my-digits"), tmp_path / "work")
    try:
        facts = server.describe()
        with client_of(server) as client:
            answer = infer(client, HELDOUT["IMAGE"][:4])
    finally:
        server.stop()
    with torch.inference_mode():
        np.testing.assert_allclose(answer, network(torch.from_numpy(HELDOUT["IMAGE"][:4])).numpy(), rtol=1e-3, atol=1e-4)
    assert facts["weights"]["origin"] == "hub cache, me/my-digits@main, commit c0ffee, pytorch_model.bin"


@needs_wheel
@pytest.mark.triton
def test_a_killed_server_is_seen_and_swept(tmp_path: Path) -> None:
    weights = Path(shutil.copy(DIGITS.weights_path, tmp_path / "mine.pt"))
    killed = TritonLauncher().launch("digits", TritonOptions(weights=weights), tmp_path / "work")
    members = family(killed)
    assert killed.describe()["weights"]["origin"] == str(weights)
    members[0].kill()
    os.waitid(os.P_PID, members[0].pid, os.WEXITED | os.WNOWAIT)  # the end of it, left for stop to collect
    assert len(shm_regions(killed)) == 1  # what a killed Triton leaves behind
    started_s = time.monotonic()
    killed.stop()
    assert time.monotonic() - started_s < 5  # instances that ignore signals are not waited for
    assert killed.exit_code() == -9
    assert not any(alive(member) for member in members)
    assert shm_regions(killed) == []
