"""A server's operating-system process: started in its own group, logged, awaited, and ended without leftovers.

Contract. The server is the leader of a new session (hence of a process group), its output goes
to one file, and it dies with us: the kernel sends it SIGKILL when the thread that started it ends
(``PR_SET_PDEATHSIG``). `ServerProcess.stop` ends every process of the session, also after the
leader itself is gone, and those that started sessions of their own (torch's launchers do): an
environment variable, which they inherit, gives them away.

Plan. The server is started through a few lines of Python that prepare the process and then
become the server by ``exec``, so the process id is the server's own. ``preexec_fn`` would do it
without an interpreter start (some 15 ms), but runs between fork and exec, where a process
with threads can deadlock.

A dead leader is left unreaped until `stop`: a zombie keeps its process id, so no stranger can
come to own the group id that is signalled.

Limits: a grandchild with a session *and* an environment of its own escapes `stop`, and one whose
leader was killed along with us has to notice that by itself (Triton's Python workers do).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from servebench.errors import LaunchError

_POLL_S = 0.01
_TAIL_BYTES = 64 * 1024
_MARK = "SERVEBENCH_SERVER"
# For those that ignore SIGINT; one that is still busy ending heard nothing new.
_TERM_GRACE_S = 1.0
# For processes that outlive their leader, perhaps because they were started too late to hear the signal.
_ORPHANS_GRACE_S = 1.0

# Runs in the new process. The parent may have died before prctl: then nobody would signal us, so
# compare the parent's id. Ignored signals survive exec (a shell's background jobs ignore
# SIGINT), and so do blocked ones: a server must hear `stop`.
_BECOME_SERVER = """
import ctypes, os, signal, sys
parent, cpus, argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) failed")
if os.getppid() != parent:
    sys.exit("the parent died before the server was started")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
try:
    if cpus:
        os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
except OSError as error:
    sys.exit(f"cannot run on CPUs {cpus}: {error.strerror}")
try:
    os.execvp(argv[0], argv)
except OSError as error:
    sys.exit(f"cannot run {argv[0]}: {error.strerror}")
"""


class ServerProcess:
    """A started server process. Use it from one thread.

    ``argv`` is the command, ``name`` what errors call it, ``log_path`` the file that receives its
    stdout and stderr (overwritten). ``env`` and ``cwd`` default to ours; ``cpus`` pins the process
    and all it starts. Raises `LaunchError` when the command does not exist, and RuntimeError
    outside the main thread: the kernel would kill the server when that thread ends.
    """

    #: How long the leader may go on in `stop` when no other process of the server is left; None: as long as with others.
    alone_grace_s: float | None = None

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log_path: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        cpus: Sequence[int] | None = None,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a ServerProcess must be started from the main thread; it dies with the thread that starts it")
        if shutil.which(argv[0], path=None if env is None else env.get("PATH")) is None:
            raise LaunchError(f"{name}: there is no command {argv[0]!r}; install it, or put it on the PATH")
        self.name = name
        self.argv = tuple(argv)
        self.log_path = log_path
        cpu_list = ",".join(str(cpu) for cpu in cpus or ())
        mark = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._mark = f"{_MARK}={mark}".encode()
        with log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BECOME_SERVER, str(os.getpid()), cpu_list, *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**(os.environ if env is None else env), _MARK: mark},
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the server; also its group's and its session's id."""
        return self._popen.pid

    def exit_code(self) -> int | None:
        """None while the process runs, else its exit code (negative: the signal that ended it)."""
        if self._popen.returncode is not None:
            return self._popen.returncode
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def log_tail(self, lines: int = 20) -> str:
        """The last ``lines`` lines of the log ("" for an empty one); bytes that are not UTF-8 are replaced."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def wait_ready(self, probe: Callable[[], bool], deadline_s: float) -> None:
        """Call ``probe`` until it returns True, for at most ``deadline_s`` seconds.

        `LaunchError` when the process ends or time is over, with the cause in its text and the
        end of the log in its ``log_tail``. The process is stopped whenever this raises, which
        includes an exception from ``probe``.
        """
        try:
            self._wait_ready(probe, deadline_s)
        except BaseException:
            self.stop(grace_s=1.0)
            raise

    def stop(self, grace_s: float = 5.0) -> None:
        """End every process of the server: SIGINT, after ``grace_s`` SIGTERM, a second later (or ``grace_s``) SIGKILL.

        Without their leader the others get a second each time. Returns when all are gone and the
        exit code is collected; idempotent.
        """
        if self._popen.returncode is not None:
            return
        waits = ((signal.SIGINT, grace_s), (signal.SIGTERM, min(grace_s, _TERM_GRACE_S)), (signal.SIGKILL, None))
        for number, wait_s in waits:
            if self._signal_and_wait(number, wait_s):
                break
        self._popen.wait()

    def _wait_ready(self, probe: Callable[[], bool], deadline_s: float) -> None:
        started_s = time.monotonic()
        while not probe():
            code = self.exit_code()
            waited_s = time.monotonic() - started_s
            if code is not None:
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                tail = self.log_tail()
                last_words = tail.rpartition("\n")[2] or "it wrote nothing"
                raise LaunchError(f"{self.name} ended ({how}) before it was ready: {last_words}", log_tail=tail)
            if waited_s >= deadline_s:
                raise LaunchError(f"{self.name} was not ready within {deadline_s:g} s", log_tail=self.log_tail())
            time.sleep(_POLL_S)

    def _signal_and_wait(self, number: signal.Signals, wait_s: float | None) -> bool:
        """Signal the whole server; True when no process of it lives after at most ``wait_s`` (None: no limit)."""
        started_s = alone_since_s = orphaned_since_s = time.monotonic()
        members = self._members()
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while members:
            now_s = time.monotonic()
            if members != [self.pid]:
                alone_since_s = now_s
            if self.pid in members:
                orphaned_since_s = now_s
            over = (
                now_s - started_s >= (wait_s or 0.0)
                or (self.alone_grace_s is not None and now_s - alone_since_s >= self.alone_grace_s)
                or now_s - orphaned_since_s >= _ORPHANS_GRACE_S
            )
            if over and wait_s is not None:
                return False
            time.sleep(_POLL_S)
            members = self._members()
            if number is signal.SIGKILL:  # one that was forked while we counted
                for pid in members:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
        return True

    def _members(self) -> list[int]:
        """Ids of the server's living processes. Zombies are dead: they wait for their parent, not for us."""
        members = []
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            try:
                stat = Path(entry.path, "stat").read_bytes()
                # "pid (command) state ppid pgrp session ..."; the command may hold spaces and parentheses (proc(5)).
                state, _, _, session, *_ = stat[stat.rindex(b")") + 2 :].split()
                if state in (b"Z", b"X"):
                    continue
                if int(session) == self.pid or self._mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    members.append(int(entry.name))
            except OSError:  # ended since the listing, or somebody else's
                continue
        return members
