import io
import os
import pickle
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from lightning_modules.checkpoints import load_frozen
from lightning_modules.files import (
    LONGEST_NAME,
    NotWrittenError,
    UnreadableError,
    demand_file_name,
    file_name,
    read_array,
    read_cached,
    read_tensors,
    whole_file,
)

STATE = {"weight": torch.arange(20.0), "more": {"step": 3, "names": ["a", "b"]}}


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def same(found: Any) -> bool:
    return torch.equal(found["weight"], STATE["weight"]) and found["more"] == STATE["more"]


def refuses(path: Path) -> bool:
    """True if the file cannot be read, False if it was read right."""
    try:
        found = read_tensors(path)
    except UnreadableError:
        return True
    assert same(found)
    return False


def test_no_changed_byte_passes_for_the_truth(tmp_path: Path) -> None:
    """torch alone takes a changed number for the number, which is shown here, too."""
    path, whole = tmp_path / "a.ckpt", saved(STATE)
    deceived = refused = 0
    number = whole.index(STATE["weight"].numpy().tobytes())
    with ZipFile(io.BytesIO(whole)) as archive:
        directory = range(archive.start_dir, len(whole))
    for position in (*range(0, len(whole), 7), *range(number, number + 80), *directory):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        refused += refuses(path)
        if number <= position < number + 80:
            deceived += not same(torch.load(path, weights_only=True))
    assert deceived >= 80
    assert refused > 400


@pytest.mark.parametrize("size", [0, 1, 3, 10, 700, -1])
def test_a_file_that_was_cut_short(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(saved(STATE)[:size])
    with pytest.raises(UnreadableError, match="empty" if size == 0 else "cut short|damaged"):
        read_tensors(path)
    assert read_cached(path) is None, "a cache is made anew"
    path.write_bytes(bytes(5000))
    with pytest.raises(UnreadableError, match=r"nothing that torch\.save wrote"):
        read_tensors(path)


def test_older_formats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(saved(STATE, _use_new_zipfile_serialization=False))
    assert same(read_tensors(path))


class Evil:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.victim}",)


PICKLES: dict[str, Callable[[Any], bytes]] = {
    "torch": lambda evil: saved({"state_dict": evil}),
    "legacy torch": lambda evil: saved([evil], _use_new_zipfile_serialization=False),
    **{f"protocol {n}": lambda evil, n=n: pickle.dumps(evil, n) for n in (0, 2, 4, 5)},  # type: ignore[misc]
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_malicious_pickle_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a.ckpt"
    path.write_bytes(PICKLES[kind](Evil(victim)))
    readers: list[Callable[[], Any]] = [
        lambda: read_tensors(path),
        lambda: load_frozen(path, "--model.teacher"),
    ]
    if kind.startswith("protocol"):
        readers.append(lambda: read_array(path))
    for read in readers:
        with pytest.raises(UnreadableError) as caught:
            read()
        for part in (str(path), "would have Python run posix.system", "refused", "nothing in it"):
            assert part in str(caught.value), caught.value
    assert not victim.exists()
    if kind.startswith("protocol"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert victim.exists(), "the pickle does what is said of it"


def test_objects_in_an_array_and_whole_modules_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Evil(tmp_path / "victim")], dtype=object))
    with pytest.raises(UnreadableError, match=r"a\.npy .*would have Python run .*posix\.system"):
        read_array(tmp_path / "a.npy")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(
        UnreadableError, match=r"run torch\.nn\.modules\.linear\.Linear.*state_dict"
    ):
        read_tensors(tmp_path / "a.pt")
    assert not (tmp_path / "victim").exists()
    (tmp_path / "text.pt").write_text("cat\ndog\n")
    with pytest.raises(UnreadableError, match="nothing that torch"):
        read_tensors(tmp_path / "text.pt")


@pytest.fixture
def small_files() -> Any:
    """The system refuses to let a file grow beyond 20000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_alone(tmp_path: Path, small_files: Any) -> None:
    path = tmp_path / "a.ckpt"

    def write(content: Any) -> None:
        with whole_file(path) as file:
            torch.save(content, file)

    write(STATE)
    with pytest.raises(NotWrittenError) as caught:
        write({"weight": torch.zeros(10**5)})
    assert f"{path} could not be written (File too large)" in str(caught.value)
    assert "bytes are free there" in str(caught.value)
    assert same(read_tensors(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_is_replaced_can_be_kept(tmp_path: Path) -> None:
    path, keep = tmp_path / "new", tmp_path / "old"
    for text in (b"1", b"2", b"3"):
        with whole_file(path, keep) as file:
            file.write(text)
    assert (path.read_bytes(), keep.read_bytes()) == (b"3", b"2")

    def die() -> None:
        with whole_file(path, keep) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        die()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize("text", ["a", "W4A4", "run-000", "müßig 1", "job_4711.2", "split=0,1"])
def test_plain_names_stay(text: str) -> None:
    assert file_name(text) == demand_file_name(text, "--run.name") == text


NO_NAMES = ["", ".", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", ".hidden", "-c"]


@pytest.mark.parametrize("text", [*NO_NAMES, "x" * 300, "ü" * 200])
def test_other_texts_are_made_names_or_refused(text: str, tmp_path: Path) -> None:
    name = file_name(text)
    assert (tmp_path / name).resolve().parent == tmp_path
    (tmp_path / name).touch()
    assert len(name.encode()) <= LONGEST_NAME + 9
    assert file_name(name) == name or len(text) >= LONGEST_NAME
    with pytest.raises(ValueError, match=r"--run\.name .* must be one plain name"):
        demand_file_name(text, "--run.name")


def test_two_texts_never_share_a_name() -> None:
    texts = ["a/b", "a_b", "a:b", "../a", "a", "x" * 300, "x" * 301]
    assert len({file_name(text) for text in texts}) == len(texts)


def test_nothing_else_reads_pickles() -> None:
    """Every door by which a file comes in is this module's."""
    root = Path(__file__).parents[2]
    doors = re.compile(
        r"torch\.load\(|np\.load\(|\bpickle\b\.|import pickle|joblib|weights_only=False|yaml\.load\("
    )
    found = set()
    for folder in ("lightning_modules", "callbacks", "datamodules"):
        for path in (root / folder).rglob("*.py"):
            if doors.search(path.read_text()):
                found.add(path.relative_to(root).as_posix())
    # The first says with weights_only=False that it saves everything.
    assert found == {"callbacks/checkpoint.py", "lightning_modules/files.py"}
    assert not re.search(r"\bload\(", (root / "callbacks/checkpoint.py").read_text())
