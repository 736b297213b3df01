"""Files of a run: written whole or not at all, read without running anything that is in them, named safely."""

import hashlib
import os
import pickletools
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

LONGEST_NAME = 200


class NotWrittenError(OSError):
    """A file could not be written, as a rule because the disk is full; what was in its place is as it was."""


class UnreadableError(RuntimeError):
    """A file is damaged, or holds something else than numbers, or something that would have to be run."""


# ------------------------------------------------------------------ writing
@contextmanager
def whole_file(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Lets the body write beside ``path`` and puts the file in its place when it is on the disk, by renaming.

    Args:
        path: of the file; its folder is made.
        keep: where the file that is replaced goes, None for nowhere.

    Yields:
        The open file.

    Raises:
        NotWrittenError: naming the path, the reason and the free space. Nothing is left beside ``path``.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        reason = _system_error(error)
        if reason is None:
            raise
        raise NotWrittenError(
            f"{path} could not be written ({reason.strerror or reason}), {free_space(path)}"
        ) from error


def free_space(path: Path) -> str:
    """How many bytes are free where ``path`` is, or would be, in words."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return f"{shutil.disk_usage(existing).free:,} bytes are free there"


def _system_error(error: BaseException) -> OSError | None:
    """The error of the system; torch reports one of its own that came of it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(error, OSError | RuntimeError) else None


# ------------------------------------------------------------------ reading
def read_tensors(path: str | Path, what: str = "checkpoint") -> Any:
    """Reads what ``torch.save`` wrote: tensors, numbers, text and containers of these, on the CPU.

    Nothing in the file is run. Every byte is checked against the checksums that torch writes and does not look at
    itself: it notices a file that was cut short, but takes a changed number for the number.

    Args:
        path: of the file.
        what: it should be, for the message.

    Raises:
        UnreadableError: saying what is wrong with it.
    """
    path = Path(path)
    damage = _damage(path)
    if damage is None:
        try:
            with warnings.catch_warnings(
                action="ignore"
            ):  # torch's own, of pickles it refuses next
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types for what is no such file
            wanted = _demanded(path)
            if wanted:
                raise UnreadableError(_refusal(path, what, wanted)) from error
            damage = "it is damaged, or nothing that torch.save wrote"
    raise UnreadableError(f"{path} is not a readable {what}: {damage}")


def read_cached(path: Path) -> Any:
    """What an earlier run has kept; None where there is nothing, or it is damaged and must be made anew."""
    if not path.is_file():
        return None
    try:
        return read_tensors(path, "cache")
    except UnreadableError as error:
        rank_zero_warn(f"{error}; it is made anew")
        return None


def read_array(path: str | Path, what: str = "array") -> np.ndarray[Any, Any]:
    """The array of a ``.npy`` file, which stays on disk until it is used; nothing in the file is run.

    Raises:
        UnreadableError: saying what is wrong with it.
    """
    path = Path(path)
    try:
        # Copy-on-write, since torch does not like read-only memory.
        found = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # numpy, too
        wanted = _demanded(path)
        if wanted:
            raise UnreadableError(_refusal(path, what, wanted)) from error
        damage = "it is empty, cut short or no .npy file"
        if "object" in str(error).lower():
            damage = "it holds Python objects, which only running its code would bring back"
        raise UnreadableError(f"{path} is not a readable {what}: {damage}") from error
    if not isinstance(found, np.ndarray):
        raise UnreadableError(f"{path} is not a readable {what}: it holds a {type(found).__name__}")
    return found


def _damage(path: Path) -> str | None:
    """What is wrong with the bytes of a file, None if they are sound or of a format without checksums."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if not head:
            return "it is empty"
        if head != b"PK\3\4":
            return None
        with ZipFile(path) as archive:
            # torch believes the one size and the checksum is made of the other.
            wrong = [e.filename for e in archive.infolist() if e.compress_size != e.file_size]
            broken = wrong[0] if wrong else archive.testzip()
    except BadZipFile:
        return "it was cut short or is damaged"
    except Exception as error:  # zipfile has as many types for a damaged archive as torch
        return f"it is damaged ({' '.join(str(error).split()) or type(error).__name__})"
    return None if broken is None else f"it is damaged, the checksum of {broken} is wrong"


_HARMLESS = re.compile(
    r"torch\._utils\.|torch\.(\w*Storage|Size)$|collections\.OrderedDict$"
    r"|numpy\.(ndarray|dtype)$|numpy\._?core\.multiarray\._reconstruct$"
)


def _demanded(path: Path) -> list[str]:
    """Functions and classes that a pickle would have Python load, found by reading and not by obeying it."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(0)
            if head.startswith(b"PK\3\4"):
                with ZipFile(file) as archive:
                    inside = (n for n in archive.namelist() if n.endswith("data.pkl"))
                    return _globals(archive.read(next(inside)))
            if head.startswith(b"\x93NUMPY"):
                layout = np.lib.format
                first = layout.read_magic(file) == (1, 0)
                (layout.read_array_header_1_0 if first else layout.read_array_header_2_0)(file)
            return _globals(file.read())
    except Exception:  # whatever it is, it is none of the files that this looks for
        return []


def _globals(stream: bytes) -> list[str]:
    found: dict[str, None] = {}
    is_pickle = False
    try:
        while stream:  # torch's older format is several pickles, one after the other
            texts, memo, last, end = [""], list[str](), "", 0
            for code, argument, position in pickletools.genops(stream):
                is_pickle |= code.name in ("PROTO", "STOP")
                if code.name in ("GLOBAL", "INST"):
                    found[str(argument).replace(" ", ".")] = None
                elif code.name == "STACK_GLOBAL":
                    found[".".join(texts[-2:])] = None
                elif code.name == "MEMOIZE":
                    memo.append(last)
                elif code.name in ("BINGET", "LONG_BINGET"):
                    argument = memo[int(argument or 0)]
                last = argument if isinstance(argument, str) else ""
                texts += [last] if last else []
                end = (position or 0) + 1
            stream = stream[end:]
    except Exception:  # the end of the pickles
        pass
    names = [name for name in found if re.fullmatch(r"[A-Za-z_][\w.]*", name)]
    return [name for name in names if not _HARMLESS.match(name)] if is_pickle else []


def _refusal(path: Path, what: str, wanted: list[str]) -> str:
    more = f" and {len(wanted) - 3} more" if len(wanted) > 3 else ""
    return (
        f"{path} is not a readable {what}: it is a pickle that would have Python run {', '.join(wanted[:3])}{more}; "
        "refused, and nothing in it was run. Only numbers, text and tensors are read: let whoever made it save "
        "its state_dict(), or its array, alone"
    )


# ------------------------------------------------------------------ names
def file_name(text: str) -> str:
    """A name for a file or folder made of any text: in no other folder, not hidden, not too long.

    Letters, digits, spaces and ``._+=,@()-`` stay as they are. Where something had to be changed, a hash of the text
    keeps two texts apart.
    """
    name = re.sub(r"[^\w .+=,@()-]", "_", text).lstrip(" .-").rstrip()
    name = name.encode()[:LONGEST_NAME].decode(errors="ignore")
    if name == text and name:
        return name
    return f"{name or '_'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def demand_file_name(text: str, option: str) -> str:
    """The text, if it can name a file or folder as it is.

    Raises:
        ValueError: it cannot, or would lie elsewhere; names the option and a name that can be had.
    """
    if file_name(text) != text:
        raise ValueError(
            f"{option} {text!r} must be one plain name without folders: letters, digits, spaces and ._+=,@()-, "
            f"at most {LONGEST_NAME} bytes, and no . or - in front"
        )
    return text
