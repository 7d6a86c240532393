"""The load profile: everything a run needs, in one documented, frozen object.

This module is the reference manual: a field's description here is what ``--help``,
``servebench profile-schema`` and the README's table say. Units are in the names, unknown
keys are errors, ``None`` means "no limit".
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from servebench.constraint import Constraint, parse_constraint
from servebench.errors import ProfileError

#: Where bundled profiles live in an installation, and the models' sample files beside them.
BUNDLED_PROFILES = "servebench_loadprofiles"
BUNDLED_MODELS = "servebench_servers.models"

REDACTED = "<redacted>"
Seed = Annotated[int, Field(ge=0, lt=2**64)]


def _version_text(value: object) -> object:
    """``version: 7`` is an integer to YAML. A number with a point has lost its form already: 1.10 came as 1.1."""
    if isinstance(value, float):
        raise ValueError(f"found the number {value}; write it in quotes, e.g. '1.0'")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Version = Annotated[str, BeforeValidator(_version_text, json_schema_input_type=str | int)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False, use_attribute_docstrings=True)


def _check_url(url: str, *, key: str = "url", schemes: tuple[str, ...] = ("http", "https", "grpc", "grpcs")) -> None:
    """Refuse what would be dropped silently, or would carry a secret into the run directory."""
    if "@" in url.partition("//")[2].partition("/")[0]:
        instead = "endpoint.headers or endpoint.bearer_token_env" if key == "url" else "management_token_env"
        raise ValueError(f"{key}: holds a user or password; use {instead}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # a port that is no number, or too large; a broken IPv6 address
        raise ValueError(f"{key}: {url!r}: {error}") from None
    if parts.scheme not in schemes or parts.hostname is None or port == 0:
        *others, last = (f"{scheme}://" for scheme in schemes)
        raise ValueError(f"{key}: {url!r} is not an {', '.join(others)} or {last} address")
    if parts.scheme.startswith("grpc") and port is None:
        raise ValueError(f"{key}: {url!r} needs a port, e.g. {parts.scheme}://127.0.0.1:8001")
    if parts.query or parts.fragment:
        raise ValueError(f"{key}: goes on after its path, with ? or #; give the base address alone")


class Server(_Section):
    """Who answers: a server that servebench starts for the run, or one that already runs."""

    launch: str | None = None
    """Launcher to start for the run (`triton`, `stub`, or another that is installed). Omit it to use a server that already runs at `url`."""
    url: str | None = None
    """Base URL of a server that already runs, e.g. `http://127.0.0.1:8000`, or `grpc://127.0.0.1:8001` (`https`, `grpcs` for TLS). Nothing is started or stopped."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The launcher's own settings (`servebench serve NAME --help` lists them)."""
    load_model: bool = False
    """Triton at `url`, started with `--model-control-mode=explicit`: load `endpoint.model` before the run if it is not ready, and then unload it afterwards, however the run ends."""
    management_url: str | None = None
    """TorchServe at `url`: its management API, e.g. `http://127.0.0.1:8081`. The run checks there that the model's workers are READY, and keeps its description."""
    management_token_env: str | None = None
    """Environment variable that holds the bearer token of the API at `management_url`."""
    workers: int | None = Field(default=None, ge=1, le=1_024)
    """TorchServe at `url`: scale the model to this many workers before the run, by the API at `management_url`, and back afterwards, however the run ends."""

    @model_validator(mode="after")
    def _one_of(self) -> Server:
        if (self.launch is None) == (self.url is None):
            one = "give exactly one of launch (a server to start) and url (a server that runs)"
            if self.url is not None:
                one += f"; to replace the section: --set 'server={{launch: {self.launch}}}' or --set 'server={{url: ADDRESS}}'"
            raise ValueError(one)
        if self.url is not None:
            _check_url(self.url)
            if self.options:
                raise ValueError("options belong to launch; a server at url is used as it is")
        elif self.load_model:
            raise ValueError("load_model: a launched server loads its model by itself; it is for a server at url")
        elif self.management_url is not None:
            raise ValueError("management_url: a launched server's is known; it is for a server at url")
        elif self.workers is not None:
            raise ValueError("workers: for a server at url; a launched one takes them in its options")
        return self

    @model_validator(mode="after")
    def _management(self) -> Server:
        if self.management_url is not None:
            _check_url(self.management_url, key="management_url", schemes=("http", "https"))
        elif self.workers is not None:
            raise ValueError("workers: needs management_url, the API that scales them")
        elif self.management_token_env is not None:
            raise ValueError("management_token_env: needs management_url, the API that wants the token")
        return self


class Endpoint(_Section):
    """What we ask for, and how."""

    protocol: Literal["kserve-http", "kserve-grpc", "torchserve-http", "torchserve-grpc"] = "kserve-http"
    """Wire protocol: the KServe v2 inference protocol (Triton and others) over HTTP/1.1 or gRPC, or TorchServe's own REST or gRPC API."""
    model: str
    """Name of the model on the server."""
    version: Version | None = None
    """Model version; the server chooses when omitted."""
    tensor_format: Literal["binary", "json"] = "binary"
    """How tensors travel over `kserve-http`: KServe's binary tensor extension, or plain JSON numbers. gRPC is always binary."""
    body: Literal["raw", "multipart", "instances"] = "raw"
    """What `torchserve-http` posts: the tensor's bytes (or a file) to `/predictions`, a multipart form with a field for each input, or JSON instances to `/v1/models/M:predict`. Models of several inputs take the last two."""
    parameters: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Request parameters sent with every query, e.g. `priority` or `timeout` (Triton, in microseconds)."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Extra HTTP headers or gRPC metadata. Their values never reach a run directory."""
    bearer_token_env: str | None = None
    """Environment variable that holds a bearer token for the Authorization header."""
    ca_file: Path | None = None
    """PEM file of certificate authorities to trust instead of the system's, for https."""
    verify_tls: bool = True
    """Check the server's certificate, for https; gRPC always does."""

    @property
    def framing(self) -> Literal["http", "grpc"]:
        """The kind of address that the protocol needs."""
        return "grpc" if self.protocol.endswith("-grpc") else "http"

    @model_validator(mode="after")
    def _fits_protocol(self) -> Endpoint:
        if self.tensor_format != "binary" and self.protocol != "kserve-http":
            raise ValueError(f"tensor_format: only kserve-http has a choice, not {self.protocol}")
        if self.body != "raw" and self.protocol != "torchserve-http":
            raise ValueError(f"body: only torchserve-http has a choice, not {self.protocol}")
        if not self.verify_tls and self.framing == "grpc":
            raise ValueError("verify_tls: gRPC always checks the certificate; give the authority as ca_file")
        if self.parameters and self.protocol.startswith("torchserve"):
            raise ValueError(f"parameters: {self.protocol} has none")
        if self.body == "instances" and self.version is not None:
            raise ValueError("version: TorchServe's /v1/models/M:predict has none; use body raw or multipart")
        return self


class Samples(_Section):
    """The sample library: the payloads that queries carry, and in which order."""

    source: Literal["random", "zero", "npz", "npy", "perf-analyzer", "files"] = "random"
    """`random` or `zero` tensors shaped from the model's metadata, an `npz` file (one array per input, first axis = samples), a directory of `npy` files (`<input>.npy`), a `perf-analyzer` input JSON, or a directory of `files` that are request bodies (TorchServe)."""
    path: Path | None = None
    """File or directory for `npz`, `npy`, `perf-analyzer`, `files`; relative to the profile, or `models:...` for the bundled models' files."""
    count: int = Field(default=64, ge=1, le=1_000_000)
    """How many different samples to make for `random` and `zero`; files bring their own number."""
    batch_size: int = Field(default=1, ge=1)
    """Rows of each input in one query (the client-side batch)."""
    shapes: dict[str, list[int]] = Field(default_factory=dict)
    """Shape per input without the batch axis, where the model leaves sizes open (-1)."""
    limits: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Where `random` integers of an input end: they are 0 or more, and less than this; e.g. `{TOKEN_TYPE_IDS: 2}`. 128 when omitted, for 8-bit ones all they can be."""
    payload_seed: Seed = 0
    """Seed of `random` tensors."""
    order: Literal["with_replacement", "equal_issue", "unique", "same"] = "with_replacement"
    """LoadGen's sample orders: independent draws, whole permutations (every sample equally often), each sample once (ends the run), or one sample throughout."""
    same_index: int = Field(default=0, ge=0)
    """The sample that `order: same` repeats (an index into the loaded set)."""
    performance_sample_count: int | None = Field(default=None, ge=1)
    """How many samples of the library to use (LoadGen's performance sample count); all when omitted."""
    sample_set_seed: Seed = 2085463073848966840
    """LoadGen's `qsl_rng_seed`: the order in which the samples are loaded. The default is MLPerf Inference v6.1's."""
    sample_order_seed: Seed = 2747215439041700203
    """LoadGen's `sample_index_rng_seed`: their order. The default is MLPerf Inference v6.1's."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> Samples:
        if self.source in ("random", "zero"):
            if self.path is not None:
                raise ValueError(f"path: source {self.source!r} reads no file; use source npz, npy or perf-analyzer")
        elif self.path is None:
            raise ValueError(f"path: source {self.source!r} needs a path")
        if self.limits and self.source != "random":
            raise ValueError(f"limits: for source random, found source {self.source!r}")
        return self


class Load(_Section):
    """When queries are due. Open loop: arrivals never wait for replies (MLPerf's server scenario)."""

    target_qps: float = Field(gt=0, le=10_000_000)
    """Mean arrival rate, queries per second."""
    arrivals: Literal["mlperf", "poisson", "constant"] = "mlperf"
    """Arrival process: `mlperf` is LoadGen's Poisson stream bit for bit, `poisson` uses numpy's generator, `constant` has equal gaps."""
    min_duration_s: float = Field(default=60.0, ge=0, le=86_400)
    """The schedule lasts at least this long, and has at least `min_query_count` queries."""
    min_query_count: int = Field(default=100, ge=1, le=100_000_000)
    """Smallest number of queries."""
    max_duration_s: float | None = Field(default=None, gt=0, le=86_400)
    """No query is due later than this, even if a minimum is then missed."""
    max_query_count: int | None = Field(default=None, ge=1)
    """No more queries than this, even if a minimum is then missed."""
    schedule_seed: Seed = 16159082839903944936
    """Seed of the arrival times. The default is MLPerf Inference v6.1's; one seed gives the same random numbers at every rate."""
    warmup_s: float = Field(default=2.0, ge=0, le=3_600)
    """Untimed traffic at the same rate before measuring; its replies are awaited, then the measured schedule starts."""
    timeout_s: float = Field(default=10.0, gt=0, le=3_600)
    """A query without a complete reply this long after it was issued fails with kind `timeout`."""
    drain_timeout_s: float = Field(default=10.0, gt=0, le=3_600)
    """How long to wait for outstanding replies after the last query was due; what is left is `unfinished` or, not yet sent, `shed`."""


class Client(_Section):
    """The load generator itself."""

    workers: int = Field(default=1, ge=1, le=256)
    """Worker processes; worker k of n issues arrivals k, k+n, ... of the one schedule."""
    pacing: Literal["precise", "eco"] = "precise"
    """`precise` wakes early and spins through the event loop (costs CPU, issues within tens of microseconds); `eco` relies on the kernel timer."""
    transport: Literal["wire", "aiohttp", "grpcio"] = "wire"
    """`wire` is servebench's own client, made for load; `aiohttp` (HTTP) and `grpcio` (gRPC) show what an ordinary application's client would feel."""
    warm_connections: int = Field(default=8, ge=0, le=100_000)
    """HTTP connections per worker opened before the clock starts; more are opened on demand."""
    max_connections: int | None = Field(default=None, ge=1)
    """Cap on HTTP connections per worker. A query that has to wait for one is counted and its wait is in its response time."""
    channels: int = Field(default=4, ge=1, le=1_024)
    """gRPC channels (HTTP/2 connections) per worker; each carries as many calls at once as the server allows."""
    max_outstanding: int | None = Field(default=None, ge=1)
    """Cap on outstanding queries per worker. A query due beyond it is shed: counted, and judged as over every bound."""
    cpus: list[int] | None = None
    """CPUs the workers may use, e.g. `[1]`; all when omitted."""
    apart: bool = False
    """Keep client and server on different CPUs of this host: where `cpus` is omitted, the workers take as many of the last CPUs as there are workers; a server that the run launches gets the rest (unless its options name `cpus`). Where that leaves none, all are shared."""


class OutputCheck(_Section):
    """A check of sampled replies, after the timed path: shape, dtype, byte size, and golden values where given."""

    replies: int = Field(default=256, ge=0, le=100_000)
    """How many replies to keep and check, spread evenly over the run; 0 checks none."""
    golden: Path | None = None
    """An `npz` with the expected outputs (one array per output, first axis = samples, same order as the sample library)."""
    rtol: float = Field(default=1e-3, ge=0)
    """Relative tolerance against golden values."""
    atol: float = Field(default=1e-4, ge=0)
    """Absolute tolerance against golden values."""


_CLIENT_SETTINGS_OF = {"http": ("warm_connections", "max_connections"), "grpc": ("channels",)}


class Profile(_Section):
    """A load profile: who answers, what is asked, when, by whom, and the promise that is judged."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run directory, and of the profile in reports."""
    description: str = ""
    """One line for people."""
    server: Server
    endpoint: Endpoint
    samples: Samples = Samples()
    load: Load
    client: Client = Client()
    constraints: list[str] = Field(min_length=1)
    """The promises, all of which must hold: `p99 <= 50ms`, `errors < 0.1%`, ... The first latency percentile is the headline (MLPerf's target latency)."""
    output_check: OutputCheck = OutputCheck()

    @model_validator(mode="after")
    def _sections_fit(self) -> Profile:
        endpoint, url = self.endpoint, self.server.url
        if url is not None and url.startswith("grpc") != (endpoint.framing == "grpc"):
            scheme = "grpc:// or grpcs://" if endpoint.framing == "grpc" else "http:// or https://"
            raise ValueError(f"server.url: {url!r} does not fit endpoint.protocol {endpoint.protocol}, which needs {scheme}")
        if self.server.load_model and not endpoint.protocol.startswith("kserve"):
            raise ValueError(f"server.load_model: is Triton's; endpoint.protocol is {endpoint.protocol}")
        if self.server.management_url is not None and not endpoint.protocol.startswith("torchserve"):
            raise ValueError(f"server.management_url: is TorchServe's; endpoint.protocol is {endpoint.protocol}")
        if (self.client.transport, endpoint.framing) in (("aiohttp", "grpc"), ("grpcio", "http")):
            raise ValueError(f"client.transport: {self.client.transport} does not speak endpoint.protocol {endpoint.protocol}")
        if self.samples.source == "files" and not endpoint.protocol.startswith("torchserve"):
            raise ValueError(f"samples.source: files are bodies for TorchServe; endpoint.protocol is {endpoint.protocol}")
        for name in _CLIENT_SETTINGS_OF["grpc" if endpoint.framing == "http" else "http"]:
            if getattr(self.client, name) != Client.model_fields[name].default:  # effective settings name them all
                raise ValueError(
                    f"client.{name}: means nothing over {endpoint.framing} (endpoint.protocol {endpoint.protocol})"
                )
        return self

    @model_validator(mode="after")
    def _replies_are_awaited_for_as_long_as_a_bound(self) -> Profile:
        """A reply that was given up on cannot keep a promise that it would have kept."""
        for constraint in self.parsed_constraints:
            bound_ns = None if constraint.series == "delay" else constraint.latency_bound_ns
            for name in ("timeout_s", "drain_timeout_s"):
                limit_s = getattr(self.load, name)
                if bound_ns is not None and bound_ns > limit_s * 1e9:
                    raise ValueError(
                        f"load.{name}: {limit_s:g} is less than the bound of {constraint.text!r}; give replies {bound_ns / 1e9:g} s or more"
                    )
        return self

    @field_validator("constraints", mode="before")
    @classmethod
    def _constraints_are_a_list(cls, found: object) -> object:
        if isinstance(found, str):
            raise ValueError(f"found one line, write a list: [{found}]")
        if found in (None, [], {}):
            raise ValueError("at least one promise is needed, e.g. p99 <= 50ms")
        return found

    @field_validator("constraints")
    @classmethod
    def _constraints_parse(cls, lines: list[str]) -> list[str]:
        return [parse_constraint(line).text for line in lines]

    @property
    def parsed_constraints(self) -> list[Constraint]:
        """The constraints as values, in the profile's order."""
        return [parse_constraint(line) for line in self.constraints]

    def public_dict(self) -> dict[str, Any]:
        """JSON-able effective settings, header values redacted: fit for a run directory."""
        data = self.model_dump(mode="json")
        data["endpoint"]["headers"] = dict.fromkeys(self.endpoint.headers, REDACTED)
        return data


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: the first, a promise perhaps, would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[object] = []
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep=deep)


def bundled_profiles() -> dict[str, Path]:
    """Profiles that ship with servebench, name -> file."""
    folder = Path(str(resources.files(BUNDLED_PROFILES)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_profile(reference: str, overrides: list[str] | tuple[str, ...] = (), *, files_needed: bool = True) -> Profile:
    """Read a profile by file path or bundled name and apply ``key.path=value`` overrides.

    Values of overrides are YAML. Raises `ProfileError` with one line: file, key, what was
    found, what is allowed. The files that it names must exist where ``files_needed``.
    """
    path = Path(reference)
    if not path.is_file():
        bundled = bundled_profiles()
        if reference not in bundled:
            if path.is_dir():
                raise ProfileError(f"{reference}: is a directory; a profile is a file, or the name of a bundled one")
            known = _meant(reference, list(bundled), "bundled")
            raise ProfileError(f"{reference}: no such file, and no bundled profile of that name{known}")
        path = bundled[reference]
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if data is None:
        raise ProfileError(f"{path}: the file is empty")
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: a profile is a mapping of keys, found {type(data).__name__}")
    apply_overrides(data, overrides)
    profile = parse_profile(data, source=str(path))
    return _resolve_paths(profile, path.parent, files_needed=files_needed)


def parse_profile(data: dict[str, Any], *, source: str) -> Profile:
    """Validate a mapping; `ProfileError` is one line naming ``source`` and the key."""
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise ProfileError(f"{source}: {describe_validation_error(error, Profile)}") from None


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The worst problem of a pydantic error as ``key: what is wrong, what was found``, and how many others there are.

    Unknown keys come first, with the key that was meant, or all known ones; one with a slip in it is not missing besides.
    """
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    others = [problem for problem in problems if problem is not first]
    key = ".".join(str(part) for part in first["loc"]) or "profile"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        *section, slip = first["loc"]
        known = _keys_at(model, section)
        message = f"unknown key{_meant(str(slip), known, 'allowed here')}"
        others = [
            problem
            for problem in others
            if problem["type"] != "missing" or problem["loc"] != (*section, *_near(str(slip), known))
        ]
    elif first["type"] == "missing":
        message = "required, but missing"
    elif first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, found {first['input']!r}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{message}{more}" if key == "profile" and first["type"] == "value_error" else f"{key}: {message}{more}"


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys of a section, through optional ones; none where another shape of a launcher's options hides them."""
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        sections = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, BaseModel)]
        if len(sections) != 1:
            return []
        (model,) = sections
    return list(model.model_fields)


def _meant(found: str, known: Sequence[str], listing: str) -> str:
    """The known name that was meant by one that nobody knows, or all of them."""
    near = _near(found, known)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; {listing}: {', '.join(known)}" if known else ""


def _near(found: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(found, known, n=1)


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set ``key.path=value`` lines in nested mappings, in place. `ProfileError` names the line."""
    for override in overrides:
        _apply_override(data, override)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ProfileError(f"--set {override!r}: write key.path=value, e.g. load.target_qps=300")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ProfileError(f"--set {override!r}: the value is not YAML") from None
    node = data
    *parents, last = key.strip().split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ProfileError(f"--set {override!r}: {part!r} holds a value, not a section")
        node = child
    node[last] = value


def _resolve_paths(profile: Profile, base: Path, *, files_needed: bool) -> Profile:
    def resolve(path: Path | None, key: str) -> Path | None:
        if path is None:
            return None
        text = str(path)
        if text.startswith("models:"):
            resolved = Path(str(resources.files(BUNDLED_MODELS))) / text.removeprefix("models:")
        else:
            resolved = (base / path.expanduser()).absolute()  # the effective profile may be run from anywhere
        if files_needed and not resolved.exists():
            raise ProfileError(f"{key}: {resolved}: no such file or directory")
        return resolved

    samples = profile.samples.model_copy(update={"path": resolve(profile.samples.path, "samples.path")})
    check = profile.output_check.model_copy(update={"golden": resolve(profile.output_check.golden, "output_check.golden")})
    endpoint = profile.endpoint.model_copy(update={"ca_file": resolve(profile.endpoint.ca_file, "endpoint.ca_file")})
    return profile.model_copy(update={"samples": samples, "output_check": check, "endpoint": endpoint})
