"""Load profiles: defaults, overrides, where paths lead, what is refused and with which words, and that secrets stay out."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from servebench.errors import ProfileError
from servebench.load.scenario import plan_server
from servebench.profile import (
    REDACTED,
    Profile,
    apply_overrides,
    bundled_profiles,
    describe_validation_error,
    load_profile,
    parse_profile,
)

MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "server": {"url": "http://127.0.0.1:8000"},
    "endpoint": {"model": "m"},
    "load": {"target_qps": 100},
    "constraints": ["p99 <= 50ms"],
}


def parsed(*overrides: str) -> Profile:
    """The minimal profile with overrides."""
    data = copy.deepcopy(MINIMAL)
    apply_overrides(data, overrides)
    return parse_profile(data, source="test")


def written(folder: Path, *overrides: str) -> Path:
    data = copy.deepcopy(MINIMAL)
    apply_overrides(data, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


# --- defaults and overrides ---------------------------------------------------------------


def test_defaults_are_mlperfs_where_it_has_some() -> None:
    """LoadGen's test_settings.h (100 queries at least) and mlperf.conf of MLPerf Inference v6.1 (60 s at least, the seeds)."""
    profile = parsed()
    assert profile.load.arrivals == "mlperf"
    assert (profile.load.min_duration_s, profile.load.min_query_count) == (60.0, 100)
    assert (profile.load.max_duration_s, profile.load.max_query_count) == (None, None)
    assert profile.samples.sample_set_seed == 2085463073848966840
    assert profile.samples.sample_order_seed == 2747215439041700203
    assert profile.load.schedule_seed == 16159082839903944936
    assert (profile.samples.order, profile.samples.performance_sample_count) == ("with_replacement", None)


def test_caps_are_off_unless_asked_for() -> None:
    profile = parsed()
    assert (profile.client.max_connections, profile.client.max_outstanding, profile.client.cpus) == (None, None, None)
    assert (profile.client.workers, profile.client.pacing) == (1, "precise")
    assert profile.endpoint.verify_tls is True


@pytest.mark.parametrize(
    ("override", "found", "value"),
    [
        pytest.param("load.target_qps=300", lambda p: p.load.target_qps, 300.0, id="number"),
        pytest.param("load.target_qps=1e3", lambda p: p.load.target_qps, 1000.0, id="exponent, which is text to YAML"),
        pytest.param("load.arrivals=poisson", lambda p: p.load.arrivals, "poisson", id="word"),
        pytest.param(" load.warmup_s = 0", lambda p: p.load.warmup_s, 0.0, id="spaces"),
        pytest.param("load.max_query_count=", lambda p: p.load.max_query_count, None, id="nothing is no limit"),
        pytest.param("client.max_connections=null", lambda p: p.client.max_connections, None, id="null"),
        pytest.param("client.cpus=[0, 2]", lambda p: p.client.cpus, [0, 2], id="list"),
        pytest.param("endpoint.verify_tls=false", lambda p: p.endpoint.verify_tls, False, id="boolean"),
        pytest.param("endpoint.headers.X-Key=a=b", lambda p: p.endpoint.headers, {"X-Key": "a=b"}, id="equals in the value"),
        pytest.param("endpoint.version=7", lambda p: p.endpoint.version, "7", id="an integer for a version"),
        pytest.param("endpoint.version='1.10'", lambda p: p.endpoint.version, "1.10", id="a version in quotes"),
        pytest.param("endpoint.parameters={priority: 2}", lambda p: p.endpoint.parameters, {"priority": 2}, id="mapping"),
        pytest.param("output_check.replies=7", lambda p: p.output_check.replies, 7, id="a section that was not there"),
        pytest.param("constraints=['p90<5ms']", lambda p: p.constraints, ["p90 < 5ms"], id="constraints in one form"),
        pytest.param("load.schedule_seed=18446744073709551615", lambda p: p.load.schedule_seed, 2**64 - 1, id="largest seed"),
    ],
)
def test_overrides_are_yaml_at_a_dotted_key(override: str, found: Any, value: object) -> None:
    assert found(parsed(override)) == value


@pytest.mark.parametrize(
    ("url", "protocol"),
    [
        ("http://127.0.0.1:8000", "kserve-http"),
        ("https://models.test/some/path/", "kserve-http"),
        ("http://[::1]:8000", "kserve-http"),
        ("grpc://127.0.0.1:8001", "kserve-grpc"),
        ("grpcs://models.test:443", "torchserve-grpc"),
    ],
)
def test_addresses_of_either_kind(url: str, protocol: str) -> None:
    profile = parsed(f"server.url='{url}'", f"endpoint.protocol={protocol}")
    assert profile.server.url == url
    with pytest.raises(ProfileError, match=r"test: .*//"):
        parsed(f"server.url='{url}'", f"endpoint.protocol={'kserve-grpc' if url.startswith('http') else 'kserve-http'}")


def test_overrides_apply_in_order_and_touch_nothing_else() -> None:
    profile = parsed("load.target_qps=1", "load.target_qps=2", "load.warmup_s=3")
    expected = parsed().model_dump()
    expected["load"] |= {"target_qps": 2.0, "warmup_s": 3.0}
    assert profile.model_dump() == expected


def test_a_profile_cannot_be_changed() -> None:
    profile = parsed()
    with pytest.raises(ValidationError):
        profile.load.target_qps = 5


def test_the_bundled_profiles_load_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"stub", "digits-triton-http"} <= set(bundled_profiles())
    for name in bundled_profiles():
        assert load_profile(name).name == name
    assert load_profile("stub", ["load.target_qps=7"]).load.target_qps == 7


def test_a_file_comes_before_a_bundled_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path).rename(tmp_path / "stub")
    monkeypatch.chdir(tmp_path)
    assert load_profile("stub").name == "minimal"


# --- seeds --------------------------------------------------------------------------------


def test_each_seed_moves_its_own_dimension_only() -> None:
    def plan(*overrides: str) -> tuple[list[int], list[int]]:
        profile = parsed("load.min_duration_s=0", "load.min_query_count=500", *overrides)
        made = plan_server(profile.load, profile.samples, 64)
        return made.offsets_ns.tolist(), made.sample_index.tolist()

    offsets_ns, samples = plan()
    for seed in ("samples.sample_order_seed=5", "samples.sample_set_seed=5"):
        moved_offsets_ns, moved_samples = plan(seed)
        assert moved_offsets_ns == offsets_ns, seed
        assert moved_samples != samples, seed
    moved_offsets_ns, moved_samples = plan("load.schedule_seed=5")
    assert moved_offsets_ns != offsets_ns
    assert moved_samples == samples
    assert plan("samples.payload_seed=5") == (offsets_ns, samples)
    assert plan("load.target_qps=200")[0] == pytest.approx(np.array(offsets_ns) / 2, abs=500), "one ns a gap is cut off"


# --- paths --------------------------------------------------------------------------------

PATH_KEYS = [
    pytest.param("samples={{source: npz, path: '{}'}}", lambda p: p.samples.path, "samples.path", id="samples"),
    pytest.param("output_check.golden={}", lambda p: p.output_check.golden, "output_check.golden", id="golden"),
    pytest.param("endpoint.ca_file={}", lambda p: p.endpoint.ca_file, "endpoint.ca_file", id="ca_file"),
]


@pytest.mark.parametrize(("override", "found", "key"), PATH_KEYS)
def test_paths_are_relative_to_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, found: Any, key: str
) -> None:
    """From wherever it is run, and again from its copy in the run directory."""
    path = written(tmp_path / "profiles", override.format("../data/file"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    for reference in (str(path), "profiles/profile.yaml"):
        profile = load_profile(reference)
        assert found(profile).read_text() == "x"
        effective = tmp_path / "runs" / "profile.yaml"
        effective.parent.mkdir(exist_ok=True)
        effective.write_text(yaml.safe_dump(profile.public_dict()))
        assert found(load_profile(str(effective))).read_text() == "x"


@pytest.mark.parametrize(("override", "found", "key"), PATH_KEYS)
def test_an_absolute_path_stays(tmp_path: Path, override: str, found: Any, key: str) -> None:
    (tmp_path / "file").write_text("x")
    path = written(tmp_path / "elsewhere", override.format(tmp_path / "file"))
    assert found(load_profile(str(path))) == tmp_path / "file"


@pytest.mark.parametrize(("override", "found", "key"), PATH_KEYS)
@pytest.mark.parametrize("name", ["nowhere/file", "models:digits/nowhere.npz"])
def test_a_path_that_leads_nowhere_is_named(tmp_path: Path, override: str, found: Any, key: str, name: str) -> None:
    path = written(tmp_path, override.format(name))
    tail = name.removeprefix("models:")
    with pytest.raises(ProfileError, match=rf"^{key}: /.*/{tail}: no such file or directory$"):
        load_profile(str(path))


def test_models_leads_to_the_bundled_models(tmp_path: Path) -> None:
    path = written(tmp_path, "samples={source: npz, path: 'models:digits/heldout.npz'}")
    found = load_profile(str(path)).samples.path
    assert found is not None
    with np.load(found) as arrays:
        assert len(arrays.files) >= 1


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ca.pem").write_text("x")
    assert load_profile(str(written(tmp_path / "p", "endpoint.ca_file=~/ca.pem"))).endpoint.ca_file == tmp_path / "ca.pem"


# --- what is refused ----------------------------------------------------------------------

NOT_AN_ADDRESS = "is not an http://, https://, grpc:// or grpcs:// address"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("server={}", "server: give exactly one of launch (a server to start) and url", id="no server"),
        pytest.param("server=triton", "server: input should be a valid dictionary", id="server is a word"),
        pytest.param(
            "server.options={a: 1}", "server: options belong to launch; a server at url is used", id="options with url"
        ),
        pytest.param("server.url=127.0.0.1:8000", f"server: url: '127.0.0.1:8000' {NOT_AN_ADDRESS}", id="url without scheme"),
        pytest.param("server.url=ftp://h:1", f"server: url: 'ftp://h:1' {NOT_AN_ADDRESS}", id="another scheme"),
        pytest.param(
            "server.url=grpc://h", "server: url: 'grpc://h' needs a port, e.g. grpc://127.0.0.1:8001", id="gRPC without port"
        ),
        pytest.param("server.url='http://'", f"server: url: 'http://' {NOT_AN_ADDRESS}", id="no host"),
        pytest.param("server.url=http://:80", f"server: url: 'http://:80' {NOT_AN_ADDRESS}", id="only a port"),
        pytest.param(
            "server.url=http://h:99999", "server: url: 'http://h:99999': Port out of range 0-65535", id="port too large"
        ),
        pytest.param("server.url=http://h:0", f"server: url: 'http://h:0' {NOT_AN_ADDRESS}", id="port 0"),
        pytest.param(
            "server.url=http://h:http", "server: url: 'http://h:http': Port could not be cast to integer", id="port is a word"
        ),
        pytest.param("server.url='http://[::1'", "server: url: 'http://[::1': Invalid IPv6 URL", id="broken IPv6 address"),
        pytest.param(
            "server.url=http://u:hush@h", "server: url: holds a user or password; use endpoint.headers", id="password"
        ),
        pytest.param("server.url=http://u:hush@h:x", "server: url: holds a user or password", id="password, and broken"),
        pytest.param("server.url=http://h/?token=hush", "server: url: goes on after its path, with ? or #", id="query"),
        pytest.param("endpoint.protocol=http", "endpoint.protocol: input should be", id="unknown protocol"),
        pytest.param("endpoint.model=", "endpoint.model: input should be a valid string, found None", id="no model"),
        pytest.param("endpoint.headers={X: 5}", "endpoint.headers.X: input should be a valid string", id="header not text"),
        pytest.param("endpoint.parameters={t: [1]}", "endpoint.parameters.t", id="parameter is a list"),
        pytest.param("endpoint.parameters={t: .inf}", "endpoint.parameters.t", id="parameter JSON has no word for"),
        pytest.param(
            "samples.path=x.npz", "samples: path: source 'random' reads no file; use source npz, npy", id="path unused"
        ),
        pytest.param(
            "samples={source: zero, limits: {X: 2}}",
            "samples: limits: for source random, found source 'zero'",
            id="limits unused",
        ),
        pytest.param("samples.limits={X: 0}", "samples.limits.X: input should be greater than or equal to 1", id="limit 0"),
        pytest.param("samples.source=npy", "samples: path: source 'npy' needs a path", id="npy without path"),
        pytest.param(
            "samples.source=perf-analyzer", "samples: path: source 'perf-analyzer' needs a path", id="json without path"
        ),
        pytest.param(
            "samples.source=csv", "samples.source: input should be 'random', 'zero', 'npz', 'npy'", id="unknown source"
        ),
        pytest.param("samples.order=shuffled", "samples.order: input should be 'with_replacement'", id="unknown order"),
        pytest.param("samples.count=0", "samples.count: input should be greater than or equal to 1, found 0", id="no samples"),
        pytest.param("samples.batch_size=1.5", "samples.batch_size: input should be a valid integer", id="half a row"),
        pytest.param("samples.shapes={X: [a]}", "samples.shapes.X.0: input should be a valid integer", id="shape is a word"),
        pytest.param(
            "samples.payload_seed=-1", "samples.payload_seed: input should be greater than or equal to 0", id="negative"
        ),
        pytest.param(
            "load.schedule_seed=18446744073709551616", "load.schedule_seed: input should be less than", id="seed too large"
        ),
        pytest.param("load.target_qps=0", "load.target_qps: input should be greater than 0, found 0", id="rate 0"),
        pytest.param("load.target_qps=.nan", "load.target_qps: input should be a finite number, found nan", id="rate NaN"),
        pytest.param("load.target_qps=", "load.target_qps: input should be a valid number, found None", id="no rate"),
        pytest.param(
            "load.max_duration_s=.inf", "load.max_duration_s: input should be a finite number, found inf", id="infinite"
        ),
        pytest.param(
            "load.max_duration_s=1e300", "load.max_duration_s: input should be less than or equal to 86400", id="ages"
        ),
        pytest.param("load.max_duration_s=0", "load.max_duration_s: input should be greater than 0", id="no time"),
        pytest.param("load.timeout_s=0", "load.timeout_s: input should be greater than 0", id="no patience"),
        pytest.param("load.warmup_s=-1", "load.warmup_s: input should be greater than or equal to 0", id="negative warm-up"),
        pytest.param(
            "load.arrivals=uniform", "load.arrivals: input should be 'mlperf', 'poisson' or 'constant'", id="arrivals"
        ),
        pytest.param("client.workers=0", "client.workers: input should be greater than or equal to 1", id="no workers"),
        pytest.param(
            "client.max_outstanding=0", "client.max_outstanding: input should be greater than or equal to 1", id="cap 0"
        ),
        pytest.param("client.pacing=lazy", "client.pacing: input should be 'precise' or 'eco', found 'lazy'", id="pacing"),
        pytest.param("client.cpus=[1.5]", "client.cpus.0: input should be a valid integer", id="half a CPU"),
        pytest.param("output_check.rtol=.inf", "output_check.rtol: input should be a finite number", id="any answer will do"),
        pytest.param(
            "output_check.replies=-1", "output_check.replies: input should be greater than or equal to 0", id="-1 replies"
        ),
        pytest.param(
            "constraints=p99 <= 5ms", "constraints: found one line, write a list: [p99 <= 5ms]", id="one line instead of a list"
        ),
        pytest.param("constraints=5", "constraints: input should be a valid list, found 5", id="a number instead of a list"),
        pytest.param("constraints=", "constraints: at least one promise is needed, e.g. p99 <= 50ms", id="no promise"),
        pytest.param("constraints=[p99 <= 5ms, 7]", "constraints.1: input should be a valid string", id="a number among them"),
        pytest.param("constraints=[p99 <= 5ms, max < 5]", "constraints: '5' is not a time", id="the second is wrong"),
        pytest.param("name=a b", "name: string should match pattern", id="name with a space"),
        pytest.param("name=..", "name: string should match pattern", id="name leads upward"),
        pytest.param("endpoint.qqq=x", "endpoint.qqq: unknown key; allowed here: protocol, model, version,", id="unknown key"),
        pytest.param("endpoint.modle=x", "endpoint.modle: unknown key; did you mean model?", id="a slip in a key"),
        pytest.param(
            "endpoint.version=1.10", "endpoint.version: found the number 1.1; write it in quotes", id="version lost its zero"
        ),
        pytest.param("endpoint.version=true", "endpoint.version: input should be a valid string", id="version is a truth"),
        pytest.param(
            "server.launch=stub",
            "server: give exactly one of launch (a server to start) and url (a server that runs); "
            "to replace the section: --set 'server={launch: stub}' or --set 'server={url: ADDRESS}'",
            id="launch and url",
        ),
        pytest.param("output_check.x.y=1", "output_check.x: unknown key; allowed here: replies, golden,", id="unknown section"),
    ],
)
def test_bad_settings_name_the_key_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ProfileError) as caught:
        parsed(override)
    text = str(caught.value)
    assert text.startswith(f"test: {message}"), text
    assert "\n" not in text
    assert "hush" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("load", "--set 'load': write key.path=value, e.g. load.target_qps=300", id="no value"),
        pytest.param("=5", "--set '=5': write key.path=value", id="no key"),
        pytest.param("load.target_qps=[", "--set 'load.target_qps=[': the value is not YAML", id="not YAML"),
        pytest.param("name.x=5", "--set 'name.x=5': 'name' holds a value, not a section", id="below a value"),
        pytest.param("constraints.0=p99 < 5ms", "'constraints' holds a value, not a section", id="below a list"),
    ],
)
def test_a_bad_override_is_quoted(override: str, message: str) -> None:
    with pytest.raises(ProfileError, match=re.escape(message)):
        parsed(override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"name: \xff\xfe", "cannot be read: 'utf-8' codec can't decode byte 0xff", id="not UTF-8"),
        pytest.param(b"a: b: c", "not YAML: mapping values are not allowed here", id="not YAML"),
        pytest.param(b"a: !!python/object/apply:os.system [true]", "not YAML: could not determine a constructor", id="code"),
        pytest.param(b"# nothing\n", "the file is empty", id="empty"),
        pytest.param(b"just words", "a profile is a mapping of keys, found str", id="words"),
        pytest.param(yaml.safe_dump({**MINIMAL, 1: 2}).encode(), "1: keys should be strings", id="a number for a key"),
        pytest.param(b"{}", "name: required, but missing (and 4 more)", id="no keys"),
    ],
)
def test_a_file_that_is_no_profile_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        load_profile(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=f"^{re.escape(str(tmp_path))}: is a directory; a profile is a file"):
        load_profile(str(tmp_path))


def test_a_slip_in_the_name_of_a_bundled_profile() -> None:
    with pytest.raises(ProfileError, match=r"^stbu: no such file, and no bundled profile of that name; did you mean stub\?$"):
        load_profile("stbu")


@pytest.mark.parametrize(
    ("section", "key", "slip", "message"),
    [
        pytest.param("load", "target_qps", "target_qsp", "load.target_qsp: unknown key; did you mean target_qps?", id="key"),
        pytest.param(None, "endpoint", "endpiont", "endpiont: unknown key; did you mean endpoint?", id="section"),
        pytest.param("load", "target_qps", "rate", "load.rate: unknown key; allowed here: target_qps, arr", id="another word"),
    ],
)
def test_a_slip_in_a_required_key_is_told_before_what_is_missing(
    section: str | None, key: str, slip: str, message: str
) -> None:
    data = copy.deepcopy(MINIMAL)
    keys = data if section is None else data[section]
    keys[slip] = keys.pop(key)
    with pytest.raises(ProfileError) as caught:
        parse_profile(data, source="test")
    text = str(caught.value)
    assert text.startswith(f"test: {message}")
    # What a slip hides is the same fault; of a word that means nothing here nobody knows.
    assert text.endswith(" (and 1 more)") is ("did you mean" not in text)
    data["name"] = "not a name"
    with pytest.raises(ProfileError, match=r" \(and \d more\)$"):
        parse_profile(data, source="test")


class _Batching(BaseModel):
    model_config = ConfigDict(extra="forbid")
    delay_us: int = 0


class _Options(BaseModel):
    """As a launcher may have them: sections that can be omitted, or be one of several shapes."""

    model_config = ConfigDict(extra="forbid")
    batching: _Batching | None = None
    batches: list[_Batching] = []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"batching": {"delay_su": 1}}, "batching.delay_su: unknown key; did you mean delay_us?", id="optional"),
        pytest.param({"batching": {"zz": 1}}, "batching.zz: unknown key; allowed here: delay_us", id="optional, no slip"),
        pytest.param({"batches": [{"zz": 1}]}, "batches.0.zz: unknown key", id="in a list"),
    ],
)
def test_unknown_keys_of_any_options_are_described(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _Options.model_validate(given)
    assert describe_validation_error(caught.value, _Options) == message


def test_files_that_are_not_needed_may_be_absent(tmp_path: Path) -> None:
    path = written(tmp_path, "samples={source: npz, path: nowhere.npz}")
    assert load_profile(str(path), files_needed=False).samples.path == tmp_path / "nowhere.npz"


# --- secrets ------------------------------------------------------------------------------


def test_what_is_kept_of_a_profile_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB_TEST_TOKEN", "hush-env")
    profile = parsed(
        "endpoint.headers={Authorization: Bearer hush-header, X-Tenant: hush-tenant}", "endpoint.bearer_token_env=SB_TEST_TOKEN"
    )
    kept = profile.public_dict()
    assert kept["endpoint"]["headers"] == {"Authorization": REDACTED, "X-Tenant": REDACTED}
    assert kept["endpoint"]["bearer_token_env"] == "SB_TEST_TOKEN"
    assert "hush" not in repr(kept)
    assert profile.endpoint.headers["X-Tenant"] == "hush-tenant", "the run itself needs it"


def test_what_is_kept_is_the_whole_profile_and_can_be_read_again() -> None:
    profile = parsed("client.cpus=[0]", "samples.shapes={X: [3, 4]}", "constraints=['p99<=5ms', 'errors < 1 %']")
    again = parse_profile(yaml.safe_load(yaml.safe_dump(profile.public_dict())), source="again")
    assert again == profile
