"""Real runs, killed and hurt: what is lost?

    python tests/faults.py            # a few of each fault, some minutes on two cores
    python tests/faults.py --long     # some 140; or --times 5, of each fault at most

Every run is compared with one that nothing happened to: it must end with the same weights, bit for
bit, and have logged the same figures and responses for every step. Prints docs/faults.md's table.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import collection
from tiny_model import save_tiny_model

import evaluate
import grpo
from engine.files import locked
from settings import UserError
from sources import formats, trec

ROOT = Path(__file__).parents[1]
STEPS = 8
TRAIN = [
    "--window_size", "4", "--draws", "4", "--steps", str(STEPS), "--batch_size", "4",
    "--group_size", "4", "--max_new_tokens", "50", "--learning_rate", "1e-4",
    "--checkpoint_every", "2",
]  # fmt: skip
EVALUATE = ["--window_size", "3", "--step_size", "1", "--max_new_tokens", "50",
            "--max_in_flight", "2"]  # fmt: skip


class Bench:
    """A folder with a tiny model and its data; and what undisturbed runs result in."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, 0
        candidates, qrels = collection()
        formats.write_candidates(candidates, folder / "candidates.jsonl")
        trec.write_qrels(qrels, folder / "qrels.txt")
        assert ended(fork(partial(save_tiny_model, candidates, folder / "tiny", 120, 4))) == 0
        files = ["--model", str(folder / "tiny"), "--candidates", str(folder / "candidates.jsonl"),
                 "--qrels", str(folder / "qrels.txt")]  # fmt: skip
        self.train, self.evaluate = files + TRAIN, files + EVALUATE
        self.trained = self.undisturbed(grpo.main)
        self.evaluated = self.undisturbed(evaluate.main)

    def undisturbed(self, program: Callable[[], None]) -> tuple[tuple, float]:
        out, started = self.new_run(), time.monotonic()
        assert ended(self.start(program, out)) == 0, log(out)
        return result(out), time.monotonic() - started

    def new_run(self) -> Path:
        self.runs += 1
        return self.folder / f"run{self.runs}"

    def start(self, program: Callable[[], None], out: Path, stream: int | None = None) -> int:
        """`python grpo.py` or `evaluate.py`, which prints to its log or to `stream`; its pid."""
        out.mkdir(parents=True, exist_ok=True)
        flags = self.train if program is grpo.main else self.evaluate

        def run() -> None:
            file = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            file = file if stream is None else stream
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.argv = ["", *flags, "--output_dir", str(out)]
            program()

        return fork(run)


def fork(work: Callable[[], None]) -> int:
    """Run `work` as a process of its own, which has nothing to import; its pid. This process
    itself only imports, for a fork of one that has worked may inherit locks nobody gives back."""
    pid = os.fork()
    if pid:
        return pid
    code: int | str | None = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code)
            code = 1
    except KeyboardInterrupt:  # before the run had begun to listen
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def torchrun(processes: int, flags: list[str], out: Path) -> subprocess.Popen:
    """The real thing, for what concerns several processes."""
    out.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    with open(out / "log.txt", "a") as file:
        return subprocess.Popen([*launch, "grpo.py", *flags, "--output_dir", str(out)], cwd=ROOT,
                                stdout=file, stderr=file)  # fmt: skip


def ended(pid: int, within: float = 600) -> int | None:
    """Its exit status (-N for signal N), or None where it still runs after so many seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def log(out: Path) -> str:
    return (out / "log.txt").read_text()


def result(out: Path) -> tuple:
    """What must not differ between runs."""
    if (out / "run.txt").exists():
        return (out / "run.txt").read_text(), (out / "windows.jsonl").read_text()
    weights = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in step.items() if "second" not in k} for step in steps]
    return weights, figures, (out / "responses.jsonl").read_text()


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def steps_kept(out: Path) -> int:
    names = [path.name for path in (out / "checkpoints").glob("step-*") if not path.suffix]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def check_end(
    bench: Bench, out: Path, program: Callable[[], None] = grpo.main, alike: bool = True
) -> None:
    """Let a run end, and compare; not `alike`: only the responses to all steps, for two processes
    round otherwise than one."""
    expected, _ = bench.trained if program is grpo.main else bench.evaluated
    assert ended(bench.start(program, out)) == 0, log(out)
    same = slice(0 if alike else -1, None)
    assert result(out)[same] == expected[same], f"{out}: another result"
    if program is grpo.main:
        assert [line["step"] for line in result(out)[1]] == list(range(STEPS))


# ------------------------------------------------------------------------------- the faults
# Each takes the bench and how often to strike, and returns what was lost.


def strikes(bench: Bench, times: int, number: int, wait: Callable[[int, Path], bool]) -> list[int]:
    """Signal training runs where `wait(pid, out)` says so (False: it has ended), up to five times
    each, and let each end; the steps that each strike cost."""
    lost: list[int] = []
    while len(lost) < times:
        out = bench.new_run()
        for _ in range(min(5, times - len(lost))):
            pid = bench.start(grpo.main, out)
            if not wait(pid, out):
                break
            os.kill(pid, number)
            status = ended(pid)
            if status == 0:  # it was past its last step
                break
            assert status in (-number, 128 + number), log(out)
            lost.append(steps_done(out) - steps_kept(out))
        check_end(bench, out)
    return lost


def at_random(bench: Bench, seed: int) -> Callable[[int, Path], bool]:
    rng, (_, seconds) = random.Random(seed), bench.trained
    return lambda pid, out: ended(pid, rng.uniform(0, seconds)) is None


def killed(bench: Bench, times: int) -> str:
    lost = strikes(bench, times, signal.SIGKILL, at_random(bench, 1))
    return f"at most {max(lost)} steps, done again (checkpoints every 2)"


def killed_while_saving(bench: Bench, times: int) -> str:
    rng = random.Random(2)

    def wait(pid: int, out: Path) -> bool:
        while not list((out / "checkpoints").glob("*.tmp")):
            if ended(pid, 0.0005) is not None:
                return False
        return ended(pid, rng.uniform(0, 0.02)) is None

    lost = strikes(bench, times, signal.SIGKILL, wait)
    return f"at most {max(lost)} steps, done again (checkpoints every 2)"


def terminated(bench: Bench, times: int) -> str:
    lost = strikes(bench, times, signal.SIGTERM, at_random(bench, 3))
    assert max(lost) == 0
    return "nothing"


def interrupted(bench: Bench, times: int) -> str:
    lost = strikes(bench, times, signal.SIGINT, at_random(bench, 4))
    assert max(lost) == 0
    return "nothing"


def damaged(bench: Bench, times: int) -> str:
    """The newest checkpoint, cut, changed by one bit, without a file, with one more, of another
    step, or not one at all."""
    rng = random.Random(5)
    for i in range(times):
        out = bench.new_run()
        pid = bench.start(grpo.main, out)
        while steps_kept(out) < 4:
            assert ended(pid, 0.001) is None, log(out)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        newest = out / "checkpoints" / f"step-{steps_kept(out):06}"
        shard = next(newest.glob("shard-*"))
        content, facts = bytearray(shard.read_bytes()), newest / "checkpoint.json"
        if i % 6 == 0:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            shard.write_bytes(content)
        elif i % 6 == 1:
            shard.write_bytes(content[: rng.randrange(len(content))])
        elif i % 6 == 2:
            shard.unlink()
        elif i % 6 == 3:
            shutil.copy(bench.folder / "tiny" / "model.safetensors", newest / "stray.safetensors")
        elif i % 6 == 4:
            facts.write_text(facts.read_text().replace('"step": ', '"step": 1'))
        else:
            facts.write_text("{}")
        check_end(bench, out)
        assert f"{newest}: not used" in log(out) and "going on from step" in log(out)
    return "the steps since the checkpoint before it, done again"


def disk_full(bench: Bench, times: int) -> str:
    """A file system with room for one checkpoint, but not for a second or for the trained model;
    later made larger."""
    size = sum(p.stat().st_size for p in (bench.folder / "run1/checkpoints").glob("*8/*")) * 6 // 5
    for _ in range(times):
        out = bench.new_run()
        with file_system(out, size) as resize:
            assert ended(bench.start(grpo.main, out)) == 1
            said = log(out)
            assert "No space left on device" in said and "training goes on" in said
            assert "the trained model could not be written" in said
            assert steps_done(out) == STEPS and steps_kept(out) == 2
            resize(10 * size)
            check_end(bench, out)
    return "nothing while it ran; the steps since the last checkpoint where it ended so"


@contextmanager
def file_system(path: Path, size: int):
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("not run: it takes the right to mount a file system")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", path], check=True)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def one_of_two_killed(bench: Bench, times: int) -> str:
    """Under torchrun: one process killed, the other must not hang; then both again."""
    rng, slowest = random.Random(6), 0.0
    reference = bench.new_run()
    started = time.monotonic()
    assert torchrun(2, bench.train, reference).wait() == 0, log(reference)
    seconds = time.monotonic() - started
    for _ in range(times):
        out = bench.new_run()
        launcher = torchrun(2, bench.train, out)
        while not steps_done(out):
            assert launcher.poll() is None, log(out)
            time.sleep(0.01)
        time.sleep(rng.uniform(0, seconds / 4))
        children = subprocess.run(
            ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True
        )
        if pids := children.stdout.split():
            os.kill(int(rng.choice(pids)), signal.SIGKILL)
            struck = time.monotonic()
            launcher.wait()
            slowest = max(slowest, time.monotonic() - struck)
        assert torchrun(2, bench.train, out).wait() == 0, log(out)
        assert result(out) == result(reference)
    return f"at most 2 steps, done again; all ended within {slowest:.1f} s"


def launcher_killed(bench: Bench, times: int) -> str:
    """torchrun killed, its processes live on: a second start must leave the folder to them."""
    refused = 0
    for _ in range(times):
        out = bench.new_run()
        launcher = torchrun(2, bench.train, out)
        while not steps_done(out):
            assert launcher.poll() is None, log(out)
            time.sleep(0.01)
        launcher.kill()
        launcher.wait()
        refused += ended(bench.start(grpo.main, out)) == 1 and "is in use by" in log(out)
        while in_use(out):
            time.sleep(0.1)
        check_end(bench, out, alike=False)
    assert refused == times, f"{refused} of {times} second starts were refused"
    return "nothing: a second start is refused while they live"


def in_use(out: Path) -> bool:
    try:
        with locked(out):
            return False
    except UserError:
        return True


def two_at_once(bench: Bench, times: int) -> str:
    for _ in range(times):
        out = bench.new_run()
        pids = [bench.start(grpo.main, out) for _ in range(2)]
        assert sorted(ended(pid) for pid in pids) == [0, 1] and "is in use by" in log(out)
        check_end(bench, out)
    return "nothing: one is refused"


def nothing_printed(bench: Bench, times: int) -> str:
    """The disk of the log is full, or whoever read the output is gone."""
    for i in range(times):
        out, (reader, pipe) = bench.new_run(), os.pipe()
        os.close(reader)
        full = os.open("/dev/full", os.O_WRONLY)
        assert ended(bench.start(grpo.main, out, full if i % 2 else pipe)) == 0
        os.close(full)
        os.close(pipe)
        assert result(out) == bench.trained[0]
    return "what was printed"


def inputs_changed(bench: Bench, times: int) -> str:
    """Between a kill and the next start."""
    names = ["tiny/model.safetensors", "tiny/chat_template.jinja", "candidates.jsonl", "qrels.txt"]
    for i in range(times):
        out = bench.new_run()
        pid = bench.start(grpo.main, out)
        while steps_kept(out) < 2:
            assert ended(pid, 0.001) is None, log(out)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        file = bench.folder / names[i % len(names)]
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert ended(bench.start(grpo.main, out)) == 1, log(out)
        assert "begun with other contents of" in log(out) and file.name in log(out)
        file.write_bytes(content)
        check_end(bench, out)
    return "nothing: refused by name, until it is put back"


def evaluation_killed(bench: Bench, times: int) -> str:
    rng, (_, seconds) = random.Random(7), bench.evaluated
    kills = 0
    while kills < times:
        out = bench.new_run()
        for _ in range(min(5, times - kills)):
            pid = bench.start(evaluate.main, out)
            if ended(pid, rng.uniform(0, seconds)) is not None:
                break
            os.kill(pid, signal.SIGKILL)
            ended(pid)
            kills += 1
        check_end(bench, out, evaluate.main)
    return "the windows under way; the same files"


# name, function, how often in short (0: not at all) and in long
FAULTS = [
    ("training killed (SIGKILL) at a random moment", killed, 2, 30),
    ("training killed while a checkpoint is written", killed_while_saving, 1, 20),
    ("one of two processes killed, under torchrun", one_of_two_killed, 0, 5),
    ("SIGTERM at a random moment", terminated, 1, 20),
    ("Ctrl-C at a random moment", interrupted, 1, 10),
    ("newest checkpoint damaged", damaged, 1, 12),
    ("torchrun killed, its processes live on", launcher_killed, 0, 5),
    ("two starts at once", two_at_once, 0, 5),
    ("output into a closed pipe, or onto a full disk", nothing_printed, 1, 6),
    ("a file that is trained on changed after a kill", inputs_changed, 0, 8),
    ("disk full while checkpoints are written", disk_full, 1, 3),
    ("evaluation killed at a random moment", evaluation_killed, 2, 20),
]


def main() -> None:
    long, most = "--long" in sys.argv, sys.maxsize
    if "--times" in sys.argv:
        long, most = True, int(sys.argv[sys.argv.index("--times") + 1])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        print("| fault | times | lost |\n|---|---|---|")
        for name, fault, few, many in FAULTS:
            times = min(many if long else few, most)
            if not times:
                continue
            try:
                print(f"| {name} | {times} | {fault(bench, times)} |", flush=True)
            except PermissionError as error:
                print(f"| {name} | 0 | {error} |", flush=True)


if __name__ == "__main__":
    main()
