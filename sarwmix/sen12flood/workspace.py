"""Who owns which folder: markers, locks, and removal of exactly what the preparation created."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from sarwmix.sen12flood.layout import (
    BEING_REMOVED,
    COMPLETE,
    IMAGES,
    IN_PROGRESS,
    MANIFEST,
    PAIRS,
    SEQUENCES,
    STORE,
    STORE_PARTIAL,
    pair_path,
    read_manifest,
    read_pairs,
)
from sarwmix.sen12flood.metadata import SPLITS, parse_pair_name
from util.errors import UserError
from util.files import TEMP_SUFFIX, make_directory, read_json, remove_partial_files, write_json
from util.locks import LOCK_NAME, FolderLock

WORK_NAME = "sen12flood_work"
WORK_FORMAT = "sarwmix-sen12flood-work/1"
MARKER = "work.json"
PREPARING = "preparing SEN12-FLOOD"
LOCK_WAIT = 5.0  # seconds; workers of a killed run notice within 0.2 s that their parent is gone


class WorkFolder:
    """``<work>/sen12flood_work``: everything that the preparation keeps for itself.

    ``raw/`` extracted files, ``align/`` one record a sequence, ``aligned/`` images of the npy layout.

    Args:
        work: The user's ``--work``; it may hold other things, which are never touched.

    Raises:
        UserError: The name is taken by something that is not ours, or another preparation is running.
    """

    def __init__(self, work: Path) -> None:
        self.root = work / WORK_NAME
        if self.root.exists() and not self._is_ours():
            raise UserError(
                f"{self.root} exists and was not made by this command; expected it to be absent: choose another --work"
            )
        make_directory(self.root)
        self.lock = FolderLock(self.root, PREPARING, wait=LOCK_WAIT, workers_write=True)
        if self._is_ours() and (self.root / MARKER).exists():
            self.state: dict[str, Any] = read_json(self.root / MARKER)
        else:
            self.state = {"format": WORK_FORMAT}
            self.save()
        remove_partial_files(self.root)
        self.raw = self.root / "raw"
        self.records = self.root / "align"
        self.aligned = self.root / "aligned"

    def _is_ours(self) -> bool:
        if not self.root.is_dir():
            return False
        names = set(os.listdir(self.root)) - {LOCK_NAME}
        if MARKER not in names:
            # Killed before the marker was in place: empty, or the marker's temporary file alone.
            return all(name.startswith(f".{MARKER}.") and name.endswith(TEMP_SUFFIX) for name in names)
        with contextlib.suppress(UserError):
            content = read_json(self.root / MARKER)
            return isinstance(content, dict) and content.get("format") == WORK_FORMAT
        return False

    def save(self) -> None:
        """Write the state."""
        write_json(self.root / MARKER, self.state)

    def forget_records(self) -> None:
        """Remove the records of aligned sequences and the images they speak of."""
        if self.records.is_dir():
            for record in self.records.iterdir():
                if record.name.endswith((".json", TEMP_SUFFIX)):
                    record.unlink()
            with contextlib.suppress(OSError):
                self.records.rmdir()
        for name in (STORE_PARTIAL, STORE, MANIFEST, PAIRS, IMAGES, SEQUENCES):
            (self.aligned / name).unlink(missing_ok=True)
        if self.aligned.is_dir():
            remove_partial_files(self.aligned)
            with contextlib.suppress(OSError):
                self.aligned.rmdir()

    def remove_raw(self, targets: list[str]) -> int:
        """Remove the files that were extracted, and folders that are empty then. Returns how many files stay."""
        if not self.raw.is_dir():
            return 0
        folders = {self.raw}
        for target in targets:
            path = self.raw / target
            path.unlink(missing_ok=True)
            path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
            folders.update(parent for parent in path.parents if self.raw in parent.parents)
        for folder in sorted(folders, key=lambda f: len(f.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        return sum(len(files) for _, _, files in os.walk(self.raw))

    def remove(self) -> None:
        """Remove the marker and, where it is empty by now, our folder. The user's ``--work`` itself stays."""
        (self.root / MARKER).unlink(missing_ok=True)
        self.lock.release()
        with contextlib.suppress(OSError):
            self.root.rmdir()


class OutFolder:
    """The user's ``--out``.

    Args:
        out: The folder.
        fingerprint: What decides its content.
        overwrite: Whether a finished or different preparation of ours may be removed.

    Raises:
        UserError: Not empty and not ours, or ours with other content and no ``--overwrite``.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], *, overwrite: bool) -> None:
        self.root = out
        self.fingerprint = fingerprint
        self.manifest: dict[str, Any] | None = None
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; expected a folder that is absent or empty")
        names = set(os.listdir(out)) - {LOCK_NAME} if out.exists() else set()
        names = {n for n in names if not (n.startswith(f".{MANIFEST}.") and n.endswith(TEMP_SUFFIX))}
        manifest = read_manifest(out) if names else None
        if names and manifest is None:
            raise UserError(
                f"--out {out} is not empty ({len(names)} entries, such as {sorted(names)[0]!r}) and was not made by "
                "this command; expected an absent or empty folder: nothing was touched; choose another --out"
            )
        self._remove_first = False
        if manifest is not None:
            same = manifest.get("fingerprint") == fingerprint
            status = manifest.get("status")
            if same and status == IN_PROGRESS:
                pass  # continued
            elif overwrite:
                self._remove_first = True
            elif same and status == COMPLETE:
                self.manifest = manifest
            else:
                raise UserError(
                    f"--out {out} holds a preparation that {_difference(manifest, fingerprint)}; give --overwrite to "
                    "replace it, or choose another --out"
                )
        self.lock: FolderLock | None = None

    def begin(self) -> None:
        """Take the folder: lock it, remove an old preparation where that was asked for, and mark it as ours."""
        make_directory(self.root)
        self.lock = FolderLock(self.root, PREPARING, wait=LOCK_WAIT, workers_write=True)
        if self._remove_first:
            self._remove()
        remove_partial_files(self.root)
        if self.manifest is None:
            content = {"format": "sarwmix-sen12flood/1", "status": IN_PROGRESS, "fingerprint": self.fingerprint}
            if read_manifest(self.root) != content:
                write_json(self.root / MANIFEST, content)

    def release(self) -> None:
        """Give the folder free."""
        if self.lock is not None:
            self.lock.release()

    def remove_leftovers(self) -> None:
        """Delete temporary pair files of a killed run."""
        for split in SPLITS:
            folder = self.root / split
            if folder.is_dir():
                for path in folder.glob(f".*.npy{TEMP_SUFFIX}"):
                    if _is_pair_file(path.name[1 : -len(TEMP_SUFFIX)]):
                        path.unlink()

    def _remove(self) -> None:
        """Remove what an earlier preparation wrote here: the files in its tables, and nothing else."""
        manifest = read_manifest(self.root)
        if manifest is not None and manifest.get("status") != BEING_REMOVED:
            write_json(self.root / MANIFEST, {**manifest, "status": BEING_REMOVED})
        with contextlib.suppress(UserError):
            for pair in read_pairs(self.root):
                pair_path(self.root, pair).unlink(missing_ok=True)
        self.remove_leftovers()
        for split in SPLITS:
            with contextlib.suppress(OSError):
                (self.root / split).rmdir()
        for name in (STORE, STORE_PARTIAL, IMAGES, SEQUENCES, PAIRS, MANIFEST):
            (self.root / name).unlink(missing_ok=True)


def _is_pair_file(name: str) -> bool:
    if not name.endswith(".npy"):
        return False
    try:
        parse_pair_name(name[:-4])
    except ValueError:
        return False
    return True


def _difference(manifest: dict[str, Any], fingerprint: dict[str, Any]) -> str:
    if manifest.get("status") == BEING_REMOVED:
        return "was being removed when the command ended"
    before = manifest.get("fingerprint")
    if not isinstance(before, dict):
        return "cannot be compared with this one"
    keys = [key for key in sorted({*before, *fingerprint}) if before.get(key) != fingerprint.get(key)]
    return "differs in " + "; ".join(f"{key}: {before.get(key)!r} there, {fingerprint.get(key)!r} now" for key in keys)
