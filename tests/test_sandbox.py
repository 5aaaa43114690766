"""The sandbox: what code can do, what ends it, and what is left of it afterwards."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentmesh.errors import SandboxError, UsageError
from agentmesh.sandbox import CodeResult, Limits, containment, last_code_block, plans, run_code, runner
from agentmesh.sandbox.launch import Isolation, Plan

# Starts a process in a session of its own that outlives its parent, then waits.
ESCAPE = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)  # TOKEN"], start_new_session=True)
print("started")
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sandbox makes its folders in one test."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


@pytest.fixture(params=["strongest", "plain"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of this machine, and the one that remains where namespaces are forbidden."""
    chosen = plans.choose_plan()
    if request.param == "plain":
        plain = [plan for plan in plans._candidates() if plan.isolation is Isolation.NONE]
        chosen = next(plan for plan in plain if plans._failure(plan) is None)
        monkeypatch.setattr(runner, "choose_plan", lambda: chosen)
    return chosen


def run(code: str, **limits: Any) -> CodeResult:
    return asyncio.run(run_code(textwrap.dedent(code), Limits(**limits)))


def require(name: str) -> None:
    """Skips the test where the machine does not allow the measure it is about."""
    measure = next(measure for measure in containment() if measure.name == name)
    if not measure.active:
        pytest.skip(f"{name}: {measure.detail}")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def running(token: str) -> bool:
    lines = (" ".join(entry.info["cmdline"] or ()) for entry in psutil.process_iter(["cmdline"]))
    return any(token in line and "time.sleep(60)  #" in line and "subprocess" not in line for line in lines)


def gone(token: str) -> bool:
    """Whether the process ends within two seconds: a killed process is listed until its parent has buried it."""
    end = time.monotonic() + 2
    while running(token) and time.monotonic() < end:
        time.sleep(0.02)
    return not running(token)


def test_output_is_captured_and_the_end_is_noticed(plan: Plan) -> None:
    result = run("import sys; print('héllo'); print('oops', file=sys.stderr)")
    assert (result.stdout, result.stderr, result.exit_code, result.completed) == ("héllo\n", "oops\n", 0, True)
    assert not result.timed_out
    assert not result.truncated
    assert 0 < result.duration_s < 10
    assert plan.interpreter


def test_an_exception_ends_the_code_with_a_traceback_of_its_own_frames_only() -> None:
    result = run("def half(x):\n    return x / 0\nhalf(1)")
    assert (result.exit_code, result.completed) == (1, False)
    assert result.stderr.startswith('Traceback (most recent call last):\n  File "main.py", line 3, in <module>')
    assert "ZeroDivisionError" in result.stderr
    assert "runpy" not in result.stderr


@pytest.mark.parametrize("code", ["x = = 3", "\ud800", "\0"])
def test_text_that_is_no_python_is_an_error_of_the_code(code: str) -> None:
    result = run(code)
    assert (result.exit_code, result.completed) == (1, False)
    assert "Error" in result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os\nif os.fork(): os._exit(0)",
        "import os; os.closerange(3, 100); os._exit(0)",
    ],
)
def test_leaving_early_does_not_count_as_reaching_the_end(code: str) -> None:
    result = run(code)
    assert (result.exit_code, result.completed) == (0, False)


def test_the_seal_is_in_no_variable_of_the_callers() -> None:
    result = run("""
        import sys
        frame, names = sys._getframe(), []
        while frame := frame.f_back:
            values = {**frame.f_globals, **frame.f_locals}
            values |= {f"job {key}": value for key, value in values.get("job", {}).items()}
            names += [key for key, value in values.items() if isinstance(value, (str, bytes)) and len(value) == 32]
        print(names)
    """)
    assert result.stdout == "[]\n"


def test_a_signal_shows_as_in_a_shell() -> None:
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").exit_code == 128 + 11


def test_an_endless_loop_is_ended_at_the_time_limit_and_keeps_its_output(plan: Plan) -> None:
    result = run("print('before')\nwhile True: pass", time_s=1)
    assert (result.stdout, result.exit_code, result.timed_out, result.completed) == ("before\n", None, True, False)
    assert result.duration_s < 4
    assert plan.interpreter


@pytest.mark.parametrize("ending", ["time.sleep(60)", "", "raise SystemExit(3)"])
def test_a_process_in_its_own_session_does_not_outlive_the_run(plan: Plan, ending: str) -> None:
    token = secrets.token_hex(8)
    result = run(ESCAPE.replace("TOKEN", token) + ending, time_s=1.5)
    assert result.stdout == "started\n"
    assert gone(token), plan


def test_cancelling_leaves_no_process_and_no_folder(plan: Plan, folder: Path) -> None:
    token = secrets.token_hex(8)

    async def start_and_cancel() -> None:
        task = asyncio.create_task(run_code(ESCAPE.replace("TOKEN", token) + "time.sleep(60)"))
        while not running(token):
            assert not task.done()
            await asyncio.sleep(0.02)
        assert leftovers(folder)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(start_and_cancel(), 20))
    assert gone(token), plan
    assert leftovers(folder) == []


def test_memory_beyond_the_limit_is_refused() -> None:
    require("memory limit")
    result = run("block = bytearray(2**30)", memory_bytes=2**28)
    assert not result.completed
    assert "MemoryError" in result.stderr


def test_a_fork_bomb_meets_the_process_limit() -> None:
    require("process limit")
    result = run(
        """
        import os, time
        started = 0
        try:
            while started < 60:
                if os.fork() == 0:
                    time.sleep(30)
                    os._exit(0)
                started += 1
        except OSError:
            print("refused")
        """,
        processes=8,
    )
    assert result.stdout == "refused\n"
    assert result.duration_s < 8


def test_a_bomb_whose_processes_leave_their_session_is_ended_with_the_run(plan: Plan) -> None:
    if not (plan.other_user or plan.view):
        pytest.skip("without another user id and without namespaces such processes can slip away")
    token = secrets.token_hex(8)
    result = run(
        f"""
        import ctypes, os
        name = b"{token[:15]}"
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # the name in the process list
        print("started", flush=True)
        while True:
            try:
                if os.fork() == 0:
                    os.setsid()
            except OSError:
                pass
        """,
        time_s=1,
        processes=8,
    )
    assert (result.stdout, result.timed_out) == ("started\n", True)
    assert result.duration_s < 4
    assert not [entry for entry in psutil.process_iter(["name"]) if entry.info["name"] == token[:15]]


def test_files_beyond_the_limit_are_refused() -> None:
    result = run("open('big', 'wb').write(bytes(2**20))", file_bytes=2**16)
    assert not result.completed
    assert "OSError" in result.stderr


def test_a_flood_of_output_is_cut_and_ended_at_once(plan: Plan) -> None:
    result = run("while True: print('x' * 10_000)", output_bytes=50_000)
    assert (result.truncated, result.timed_out, result.completed, result.exit_code) == (True, False, False, None)
    assert len(result.stdout) == 50_000
    assert result.duration_s < 5
    assert plan.interpreter


def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    result = run("import os, sys; print(sorted(os.environ), sys.stdin.read() == '')")
    assert result.stdout == "['HOME', 'LANG', 'LC_ALL', 'TMPDIR'] True\n"


def test_the_folder_is_fresh_writable_and_removed(plan: Plan, folder: Path) -> None:
    for _ in range(2):
        result = run(
            "import os; open('note', 'w').write('x'); print(sorted(os.listdir()), os.getcwd() == os.environ['HOME'])"
        )
        assert result.stdout == "['main.py', 'note'] True\n", plan
    assert leftovers(folder) == []


def test_a_closed_file_of_the_caller_is_out_of_reach(folder: Path) -> None:
    if not any(
        measure.active for measure in containment() if measure.name in {"other user id", "own file system view"}
    ):
        pytest.skip("the code runs as the same user in the same file system here")
    secret = folder / "secret"
    secret.write_text("kept")
    secret.chmod(0o600)
    result = run(f"""
        for mode in ("r", "w"):
            try:
                open({str(secret)!r}, mode)
            except OSError as error:
                print("refused")
    """)
    assert result.stdout == "refused\nrefused\n"
    assert secret.read_text() == "kept"


def test_the_system_is_read_only_in_the_own_view() -> None:
    require("own file system view")
    result = run("""
        import os, pathlib
        for name in ("/", "/usr", "/dev", os.path.dirname(os.__file__)):
            try:
                pathlib.Path(name, "mark").touch()
                print("written", name)
            except OSError:
                pass
        print(pathlib.Path("/etc/passwd").exists(), len(open("/dev/urandom", "rb").read(4)))
    """)
    assert result.stdout == "False 4\n"


def test_the_network_is_out_of_reach_and_the_own_loopback_works() -> None:
    require("no network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = run(f"""
            import socket
            try:
                socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2)
            except OSError as error:
                print(type(error).__name__)
            with socket.create_server(("127.0.0.1", 0)) as own:
                socket.create_connection(own.getsockname(), timeout=2).close()
        """)
    assert (result.stdout, result.completed) == ("ConnectionRefusedError\n", True)


def test_the_code_runs_as_another_user_without_a_way_back() -> None:
    require("other user id")
    result = run("""
        import os
        print(os.getuid(), os.geteuid(), os.getgroups())
        try:
            os.setuid(0)
        except PermissionError:
            print("refused")
    """)
    first, second = result.stdout.splitlines()
    assert str(os.getuid()) not in first.split()
    assert first.endswith("[]")
    assert second == "refused"


def test_other_processes_are_invisible_in_the_own_process_namespace() -> None:
    require("own process namespace")
    require("own file system view")
    result = run("import os; print(sum(name.isdigit() for name in os.listdir('/proc')))")
    assert int(result.stdout) <= 3


def test_four_runs_at_once_do_not_mix() -> None:
    async def four() -> list[CodeResult]:
        codes = [f"import time; time.sleep(0.3); open('n', 'x').write('{n}'); print({n})" for n in range(4)]
        return await asyncio.gather(*map(run_code, codes))

    assert [(result.stdout, result.completed) for result in asyncio.run(four())] == [(f"{n}\n", True) for n in range(4)]


def test_code_that_cannot_start_is_a_sandbox_error(folder: Path) -> None:
    with pytest.raises(SandboxError, match=r"could not be started(.|\n)*File too large(.|\n)*Raise the limits"):
        run("pass", file_bytes=2)
    assert leftovers(folder) == []


def test_a_machine_where_nothing_works_is_told_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plans, "_candidates", lambda: [Plan(Isolation.NONE, other_user=False, interpreter="/no/python")]
    )
    with pytest.raises(SandboxError, match=r"none, /no/python: .*No such file(.|\n)*Check that"):
        plans.choose_plan.__wrapped__()


def test_windows_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        with pytest.raises(SandboxError, match="WSL"):
            plans.choose_plan.__wrapped__()


def test_limits_must_be_above_zero() -> None:
    with pytest.raises(UsageError, match="time_s is 0"):
        Limits(time_s=0)


def test_every_measure_says_something() -> None:
    measures = containment()
    assert len({measure.name for measure in measures}) == len(measures) == 7
    assert all(measure.detail for measure in measures)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no code", None),
        ("```\n```", None),
        ("```bash\nls\n```", None),
        ("```python\na\n```\ntext\n```py\nb\nc\n```", "b\nc\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\nOutput:\n```\n42\n```", "a\n"),
        ("```Python title=x\na\n```", "a\n"),
        ("```python\na\n\n    b", "a\n\n    b\n"),
        ("```python\na\n```python\nb\n```", "b\n"),
        ("1. so:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("~~~python\nx = '''\n```\n'''\n~~~", "x = '''\n```\n'''\n"),
        ("````python\n```\n````", "```\n"),
        ("```python\r\na\r\n```\r\n", "a\n"),
        ("a ``` b ``` c", None),
    ],
)
def test_the_last_code_block_is_found(text: str, code: str | None) -> None:
    assert last_code_block(text) == code
