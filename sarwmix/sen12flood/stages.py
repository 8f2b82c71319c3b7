"""The stages of the preparation: UNZIP, ALIGN, PAIR, CLEAN, and WRITE (npy) or CHECK (store).

Every stage can be killed at any moment. What survives is either verified by checksum or size on the next run, or made
again; the finished folder holds no time stamps or machine names, so that it is the same file by file.

Order of the last steps, store: rows compacted -> header written, file cut and synced -> tables -> renamed to images.npy
-> manifest "complete" -> records and raw files removed. npy: tables -> pairs -> manifest -> removal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.sen12flood import layout as files
from sarwmix.sen12flood.align import (
    BANDS,
    AlignedFrame,
    AlignedSequence,
    AlignOptions,
    SequenceTask,
    align_sequence,
    get_warper,
    tile_path,
    write_at,
)
from sarwmix.sen12flood.archive import Archive, extract, is_extracted
from sarwmix.sen12flood.layout import PairRow
from sarwmix.sen12flood.metadata import (
    S1LIST,
    SPLITS,
    Catalogue,
    Problem,
    SequenceInfo,
    Split,
    make_pairs,
    pair_name,
    parse_s1list,
    read_s1list,
    resolve_split,
)
from sarwmix.sen12flood.parallel import run_stage, storage_error
from sarwmix.sen12flood.workspace import OutFolder, WorkFolder
from util.errors import UserError
from util.files import (
    JSON_LIMIT,
    atomic_write,
    make_directory,
    parse_json,
    read_bytes,
    remove_partial_files,
    sha256_file,
    write_json,
)
from util.log import Progress, get_logger

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
EXPECTED_PAIRS = {"train": 11_078, "test": 2_662}  # of the full data set, after cleaning
MAX_ZEROS = 0.25
SHOWN_PROBLEMS = 20
MEMBERS_PER_TASK = 64


@dataclass(frozen=True)
class PrepareOptions:
    """Options of the command, see its help."""

    work: Path
    out: Path
    zip: Path | None = None
    raw_root: Path | None = None
    layout: str = "npy"
    warper: str = "rasterio"
    resampling: str = "nearest"
    size: int = 512
    jobs: int = 1
    skip_bad: bool = False
    keep_intermediate: bool = False
    overwrite: bool = False
    s1list: Path | None = None
    train_csv: Path | None = None
    test_csv: Path | None = None


@dataclass
class Summary:
    """Outcome of a preparation: what the manifest holds."""

    manifest: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Plan:
    """Everything that follows from the metadata alone.

    Attributes:
        split: Folders of each split.
        tasks: One for each sequence, train then test, sorted by id.
        candidates: Number of pairs (all, flood) of each split if all files were there.
        rows: Rows of the image file.
    """

    split: Split
    tasks: list[SequenceTask]
    candidates: dict[str, tuple[int, int]]
    rows: int


def prepare(options: PrepareOptions) -> Summary:
    """Run all stages.

    Raises:
        UserError: Input or output cannot be used, or bad files were found and ``skip_bad`` is off (the good pairs are
            written then, and the manifest lists the bad files).
    """
    get_warper(options.warper)
    _check_options(options)
    log = get_logger()
    archive = None
    if options.zip is not None:
        archive = Archive(options.zip)
        for line in archive.inventory().lines(options.zip.name):
            log.info(line)
    elif options.raw_root is not None and not options.raw_root.is_dir():
        raise UserError(f"raw folder {options.raw_root} does not exist; expected the folder that holds the sequences")
    catalogue, split, s1list_hash = _read_metadata(options, archive)
    for name in SPLITS:
        log.info("split %s: %d sequences (%s)", name, len(split.folders[name]), split.origin)
    problems = [*catalogue.problems, *split.problems]
    if problems:
        log.warning("%d problem(s) in the lists:", len(problems))
        _show(problems)
    fingerprint = _fingerprint(options, split, s1list_hash)
    out = OutFolder(options.out, fingerprint, overwrite=options.overwrite)
    work = WorkFolder(options.work)
    try:
        if work.state.get("fingerprint") != fingerprint:
            work.forget_records()
            work.state["fingerprint"] = fingerprint
            work.save()
        out.begin()
        if out.manifest is not None:
            summary = _check_complete(options, out)
        else:
            summary = _build(options, archive, work, out, catalogue, split, problems)
        _clean_up(options, work)
    except OSError as error:
        raise storage_error("preparation", error) from error
    finally:
        out.release()
        work.lock.release()
    _report(summary)
    if summary.problems and not options.skip_bad:
        raise UserError(
            f"{len(summary.problems)} problem(s) were found, the first: {summary.problems[0]}. All are listed in "
            f"{options.out / files.MANIFEST}, which describes the pairs that could be made. Put the input right and "
            "run again with --overwrite, or accept the pairs as they are with --skip-bad"
        )
    return summary


def _check_options(options: PrepareOptions) -> None:
    if (options.zip is None) == (options.raw_root is None):
        raise UserError("give either --zip FILE or --raw-root FOLDER, and not both")
    if options.size < 1 or options.jobs < 1:
        raise UserError(f"--size and --jobs must be at least 1, got {options.size} and {options.jobs}")
    out = options.out.resolve()
    if options.raw_root is not None:
        raw = options.raw_root.resolve()
        if out == raw or raw in out.parents:
            raise UserError(f"--out {options.out} lies in the raw folder {options.raw_root}; choose another")


def _read_metadata(options: PrepareOptions, archive: Archive | None) -> tuple[Catalogue, Split, str]:
    """S1list.json and the split, from where they are looked for; also the checksum of S1list.json."""
    log = get_logger()
    path = options.s1list
    if path is None and archive is not None:
        content = archive.read_s1list()
        if content is not None:
            catalogue = parse_s1list(content, Path(archive.path.name) / S1LIST)
            return catalogue, _read_split(options, catalogue), hashlib.sha256(content).hexdigest()
    if path is None and options.raw_root is not None and (options.raw_root / S1LIST).exists():
        path = options.raw_root / S1LIST
    if path is None:
        path = DATASETS / S1LIST
        if not path.exists():
            where = options.raw_root if archive is None else archive.path
            raise UserError(
                f"no {S1LIST} in {where} nor in {DATASETS}; expected the list of SEN12-FLOOD; give --s1list"
            )
    log.info("frames and labels from %s", path)
    catalogue = read_s1list(path)
    return catalogue, _read_split(options, catalogue), sha256_file(path)


def _read_split(options: PrepareOptions, catalogue: Catalogue) -> Split:
    train, test = options.train_csv, options.test_csv
    if train is None and test is None:
        defaults = [DATASETS / f"sen12_{name}.csv" for name in SPLITS]
        if all(path.exists() for path in defaults):
            train, test = defaults
    split = resolve_split(catalogue, train, test)
    unused = len(catalogue.sequences) - sum(len(split.folders[name]) for name in SPLITS)
    if unused:
        get_logger().info("%d sequence(s) of %s are in no split and are not used", unused, S1LIST)
    if not any(split.folders.values()):
        raise UserError("no sequence of the split lists is in S1list.json; expected ids such as those in that file")
    return split


def _fingerprint(options: PrepareOptions, split: Split, s1list_hash: str) -> dict[str, Any]:
    source: dict[str, Any] = {"kind": "folder"}
    if options.zip is not None:
        source = {"kind": "zip", "name": options.zip.name, "bytes": options.zip.stat().st_size}
    return {
        "source": source,
        "s1list_sha256": s1list_hash,
        "split_sha256": hashlib.sha256(json.dumps(split.folders, sort_keys=True).encode()).hexdigest(),
        "layout": options.layout,
        "warper": options.warper,
        "resampling": options.resampling,
        "size": options.size,
        "max_zeros": MAX_ZEROS,
    }


def make_plan(catalogue: Catalogue, split: Split, root: Path) -> Plan:
    """Candidate pairs and the row of each image that is in one."""
    tasks = []
    candidates = {}
    rows = 0
    for name in SPLITS:
        total = flood = 0
        for folder in split.folders[name]:
            sequence = catalogue.sequences[folder]
            pairs = make_pairs([frame.flooding for frame in sequence.frames])
            total += len(pairs)
            flood += sum(label for _, _, label in pairs)
            needed = {i for first, second, _ in pairs for i in (first, second)}
            numbers = []
            for i in range(len(sequence.frames)):
                numbers.append(rows if i in needed else -1)
                rows += i in needed
            tasks.append(SequenceTask(sequence, str(root), tuple(numbers)))
        candidates[name] = (total, flood)
    return Plan(split, tasks, candidates, rows)


def _build(
    options: PrepareOptions,
    archive: Archive | None,
    work: WorkFolder,
    out: OutFolder,
    catalogue: Catalogue,
    split: Split,
    problems: list[Problem],
) -> Summary:
    log = get_logger()
    if archive is not None:
        problems = problems + _unzip(options, archive, work, catalogue, split)
        root = work.raw
    else:
        assert options.raw_root is not None
        root = options.raw_root
    plan = make_plan(catalogue, split, root)
    for name in SPLITS:
        log.info("split %s: %d pairs (%d flood) if every file is usable", name, *plan.candidates[name])
    store = out.root if options.layout == "store" else work.aligned
    aligned = _align(options, plan, work, store)
    for result in aligned:
        problems = problems + result.problems
    pairs = _pair(plan)
    kept, dropped = _clean(pairs, aligned)
    table = _table(plan, kept, aligned)
    manifest = _manifest(options, plan, table, dropped, problems, aligned, out.fingerprint)
    if options.layout == "store":
        _finish_store(out.root, options, table)
    else:
        _write_tables(out.root, table)
        _write_pairs(options, table, work, out)
        if options.keep_intermediate:
            _keep_aligned(options, table, work, manifest)
    write_json(out.root / files.MANIFEST, manifest)
    return Summary(manifest, problems)


# UNZIP --------------------------------------------------------------------------------------------------------------


def _unzip(
    options: PrepareOptions, archive: Archive, work: WorkFolder, catalogue: Catalogue, split: Split
) -> list[Problem]:
    members = archive.needed(split.of())
    skipped = sum(1 for e in archive.entries if not e.is_dir()) - len(members)
    get_logger().info(
        "%d files (%.2f GB) of the zip are needed; the other %d are not extracted",
        len(members), sum(m.size for m in members) / 1e9, skipped,
    )  # fmt: skip
    status = archive.path.stat()
    identity = [archive.path.name, status.st_size, status.st_mtime_ns]
    if work.state.get("zip") != identity:
        work.remove_raw(list(work.state.pop("extracting", [])))
        work.state.pop("unzipped", None)
        work.state["zip"] = identity
        work.save()
    done = work.state.get("unzipped")
    targets = [member.target for member in members]
    if isinstance(done, dict) and done.get("targets") == targets:
        good = [member for member in members if member.target not in done["bad"]]
        if all(is_extracted(member, work.raw, check_content=False) for member in good):
            return [Problem(p["kind"], p["where"], p["message"]) for p in done["problems"]]
    work.state["extracting"] = targets  # what may be removed at the end, or after a kill
    work.save()
    make_directory(work.raw)
    present = sum(m.size for m in members if (work.raw / m.target).exists())
    _need_space(work.raw, sum(m.size for m in members) - present, "extracting the zip")
    groups = [members[i : i + MEMBERS_PER_TASK] for i in range(0, len(members), MEMBERS_PER_TASK)]
    tasks = [(str(archive.path), group, str(work.raw), True) for group in groups]
    problems: list[Problem] = []
    kept = 0
    for _, (already, found) in run_stage(
        "UNZIP", extract, tasks, jobs=options.jobs, weights=[len(group) for group in groups]
    ):
        kept += already
        problems += found
    if kept:
        get_logger().info("%d files were extracted before and have the right checksum", kept)
    problems.sort()
    bad = [problem.where for problem in problems]
    work.state["unzipped"] = {"targets": targets, "bad": bad, "problems": [p.as_dict() for p in problems]}
    work.save()
    return problems


def _need_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, but {free / 1e9:.2f} GB are free; free space or choose "
            "another folder, then run the same command again; --layout store needs about a sixth of --layout npy"
        )


# ALIGN --------------------------------------------------------------------------------------------------------------


def _inputs(task: SequenceTask) -> str:
    """Checksum over names, sizes and times of the files that an aligned sequence is made from."""
    folder = Path(task.root) / task.sequence.folder
    wanted = {tile_path(folder, frame.product, band).name for frame in task.sequence.frames for band in BANDS}
    lines = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in wanted or entry.name.endswith("_B04.tif"):
                status = entry.stat()
                lines.append(f"{entry.name} {status.st_size} {status.st_mtime_ns}")
    frames = [asdict(frame) for frame in task.sequence.frames]
    return hashlib.sha256(json.dumps([sorted(lines), frames, task.rows]).encode()).hexdigest()


def _load_record(path: Path, inputs: str) -> AlignedSequence | None:
    try:
        content = parse_json(read_bytes(path, JSON_LIMIT))
        if content["inputs"] != inputs:
            return None
        return AlignedSequence(
            str(content["folder"]),
            content["grid"],
            [AlignedFrame.from_dict(values) for values in content["frames"]],
            [Problem(p["kind"], p["where"], p["message"]) for p in content["problems"]],
            int(content["unlisted"]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _save_record(path: Path, inputs: str, result: AlignedSequence) -> None:
    content = {
        "inputs": inputs,
        "folder": result.folder,
        "grid": result.grid,
        "frames": [frame.as_dict() for frame in result.frames],
        "problems": [problem.as_dict() for problem in result.problems],
        "unlisted": result.unlisted,
    }
    files.replace_bytes(path, json.dumps(content).encode())


def read_row(file: int, row: int, size: int) -> bytes:
    """The bytes of one image; fewer at the end of the file."""
    return os.pread(file, files.row_bytes(size), files.HEADER_BYTES + row * files.row_bytes(size))


def _align_task(task: SequenceTask, options: AlignOptions, images: str, record: str) -> tuple[AlignedSequence, bool]:
    """Align one sequence unless a record of an earlier run is there and every row has its checksum."""
    inputs = _inputs(task)
    before = _load_record(Path(record), inputs)
    if before is not None:
        file = os.open(images, os.O_RDONLY)
        try:
            if all(f.row < 0 or zlib.crc32(read_row(file, f.row, options.size)) == f.crc32 for f in before.frames):
                return before, True
        finally:
            os.close(file)
    result = align_sequence(task, options, images, files.HEADER_BYTES)
    _save_record(Path(record), inputs, result)
    return result, False


def _align(options: PrepareOptions, plan: Plan, work: WorkFolder, store: Path) -> list[AlignedSequence]:
    make_directory(work.records)
    make_directory(store)
    remove_partial_files(work.records)
    remove_partial_files(store)
    images = store / files.STORE_PARTIAL
    final = store / files.STORE
    records = [work.records / f"{task.sequence.folder}.json" for task in plan.tasks]
    if final.exists() and not images.exists():
        # Killed between the renaming of images.npy and the end: usable if every record is there and fits.
        before = [_load_record(r, _inputs(t)) for r, t in zip(records, plan.tasks, strict=True)]
        if all(result is not None for result in before):
            return [result for result in before if result is not None]
        final.unlink()
    _sparse_file(images, files.HEADER_BYTES + plan.rows * files.row_bytes(options.size), store)
    align = AlignOptions(options.size, options.warper, options.resampling, MAX_ZEROS)
    tasks = [(task, align, str(images), str(record)) for task, record in zip(plan.tasks, records, strict=True)]
    results: dict[int, AlignedSequence] = {}
    again = 0
    weights = [max(1, len(task.sequence.frames)) for task in plan.tasks]
    for index, (result, reused) in run_stage("ALIGN", _align_task, tasks, jobs=options.jobs, weights=weights):
        results[index] = result
        again += reused
    log = get_logger()
    if again:
        log.info("%d sequences were aligned before and have the right checksums", again)
    aligned = [results[i] for i in range(len(tasks))]
    rebuilt = [r.folder for r in aligned if r.grid is not None and r.grid["origin"] == "polygon"]
    if rebuilt:
        log.info("%d grid(s) rebuilt from the polygon (no B04 tile): %s", len(rebuilt), ", ".join(rebuilt[:10]))
    bad = [problem for result in aligned for problem in result.problems]
    if bad:
        log.warning("%d problem(s) in the tiles:", len(bad))
        _show(bad)
    return aligned


def _sparse_file(path: Path, size: int, folder: Path) -> None:
    """Make sure that the image file has its full length; blocks are allocated as rows are written."""
    with open(path, "ab") as stream:
        allocated = os.fstat(stream.fileno()).st_blocks * 512
        _need_space(folder, size - allocated, "aligning")
        if os.fstat(stream.fileno()).st_size != size:
            os.ftruncate(stream.fileno(), size)


# PAIR and CLEAN -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A pair before cleaning: number of its sequence, the two frames in it, label."""

    sequence: int
    first: int
    second: int
    label: int


@dataclass
class Table:
    """What is kept: pairs, images, sequences.

    Attributes:
        pairs: Kept pairs in order; rows are those in the finished store.
        moves: (from, to) rows of the image file that close gaps, in this order.
        rows: Rows of the finished store.
        row_of: Row during the work -> row in the finished store.
        images: Lines of images.csv.
        sequences: Lines of sequences.csv.
        checksums: CRC-32 of each row of the finished store.
        working_rows: For each kept pair its two rows during the work.
    """

    pairs: list[PairRow]
    moves: list[tuple[int, int]]
    rows: int
    row_of: dict[int, int]
    images: list[list[Any]]
    sequences: list[list[Any]]
    checksums: list[int]
    working_rows: list[tuple[int, int]]


def _pair(plan: Plan) -> list[Candidate]:
    progress = Progress(len(plan.tasks), title="PAIR ")
    pairs = []
    for number, task in enumerate(plan.tasks):
        made = make_pairs([frame.flooding for frame in task.sequence.frames])
        pairs += [Candidate(number, first, second, label) for first, second, label in made]
        progress.update(number + 1)
    progress.close()
    return pairs


def _clean(pairs: list[Candidate], aligned: list[AlignedSequence]) -> tuple[list[Candidate], dict[str, int]]:
    """Drop pairs with an unusable image, one of another size, or one with too many zeros in a channel."""
    progress = Progress(len(pairs), title="CLEAN")
    kept = []
    dropped: Counter[str] = Counter()
    for number, pair in enumerate(pairs, 1):
        frames = aligned[pair.sequence].frames
        reason = ""
        for frame in (frames[pair.first], frames[pair.second]):
            if frame.status != "aligned":
                reason = reason or frame.status
            elif max(frame.zeros) >= MAX_ZEROS:
                reason = reason or "zeros"
        if reason:
            dropped[reason] += 1
        else:
            kept.append(pair)
        progress.update(number)
    progress.close()
    return kept, dict(sorted(dropped.items()))


def _table(plan: Plan, kept: list[Candidate], aligned: list[AlignedSequence]) -> Table:
    used: dict[int, int] = {}  # row during the work -> checksum
    for pair in kept:
        for place in (pair.first, pair.second):
            outcome = aligned[pair.sequence].frames[place]
            used[outcome.row] = outcome.crc32
    rows = len(used)
    # Rows that lie beyond the end of the finished store move into the gaps left by unused ones.
    gaps = [row for row in range(rows) if row not in used]
    tail = [row for row in sorted(used) if row >= rows]
    moves = list(zip(tail, gaps, strict=True))
    row_of = {row: row for row in used if row < rows} | dict(moves)
    checksums = [0] * rows
    for row, checksum in used.items():
        checksums[row_of[row]] = checksum
    split_of = plan.split.of()
    pairs = []
    working = []
    count: Counter[int] = Counter()
    for pair in kept:
        sequence = plan.tasks[pair.sequence].sequence
        first, second = sequence.frames[pair.first].product, sequence.frames[pair.second].product
        rows12 = (aligned[pair.sequence].frames[pair.first].row, aligned[pair.sequence].frames[pair.second].row)
        name = pair_name(sequence.folder, first, second, pair.label)
        pairs.append(
            PairRow(
                split_of[sequence.folder],
                name,
                sequence.folder,
                first,
                second,
                pair.label,
                row_of[rows12[0]],
                row_of[rows12[1]],
            )  # fmt: skip
        )
        working.append(rows12)
        count[pair.sequence] += 1
    images = []
    sequences = []
    for number, (task, result) in enumerate(zip(plan.tasks, aligned, strict=True)):
        sequence = task.sequence
        split = split_of[sequence.folder]
        good = 0
        for frame, outcome in zip(sequence.frames, result.frames, strict=True):
            good += outcome.status == "aligned"
            images.append(_image_line(split, sequence, frame.product, frame.date, frame.flooding, outcome, row_of))
        grid = result.grid or {}
        sequences.append(
            [split, sequence.folder, len(sequence.frames), good, count[number]]
            + [grid.get(key, "") for key in ("crs", "left", "top", "pixel", "width", "height", "origin")]
        )
    return Table(pairs, moves, rows, row_of, images, sequences, checksums, working)


def _image_line(
    split: str,
    sequence: SequenceInfo,
    product: str,
    date: str,
    flooding: bool,
    outcome: AlignedFrame,
    row_of: dict[int, int],
) -> list[Any]:
    status = outcome.status
    if status == "aligned":
        if max(outcome.zeros) >= MAX_ZEROS:
            status = "zeros"
        else:
            status = "used" if outcome.row in row_of else "in no pair"
    row = row_of.get(outcome.row, -1)
    zeros = [f"{value:.6f}" for value in outcome.zeros] if outcome.status in ("aligned", "other size") else ["", ""]
    checksum = f"{outcome.crc32:08x}" if row >= 0 else ""
    return [split, sequence.folder, product, date, int(flooding), status, *zeros, row, checksum]


def _write_tables(folder: Path, table: Table, *, rows: bool = False) -> None:
    """pairs.csv, images.csv and sequences.csv; row numbers only where a store lies beside them."""
    pairs = [
        [p.split, p.name, p.folder, p.first, p.second, p.label, p.row1 if rows else -1, p.row2 if rows else -1]
        for p in table.pairs
    ]
    images = [line if rows else [*line[:-2], -1, line[-1]] for line in table.images]
    for name, columns, lines in (
        (files.PAIRS, files.PAIR_COLUMNS, pairs),
        (files.IMAGES, files.IMAGE_COLUMNS, images),
        (files.SEQUENCES, files.SEQUENCE_COLUMNS, table.sequences),
    ):
        with atomic_write(folder / name) as stream:
            stream.write(files.csv_bytes(columns, lines))


# CHECK (store) and WRITE (npy) --------------------------------------------------------------------------------------


def _finish_store(folder: Path, options: PrepareOptions, table: Table) -> None:
    """Close the gaps in the image file, verify every row by checksum, and give the file its name."""
    building, final = folder / files.STORE_PARTIAL, folder / files.STORE
    path = building if building.exists() else final
    if path == building:
        file = os.open(building, os.O_RDWR)
        try:
            for source, target in table.moves:
                row = read_row(file, source, options.size)
                write_at(file, memoryview(row), files.HEADER_BYTES + target * files.row_bytes(options.size))
        finally:
            os.close(file)
    step = 64
    tasks = [
        (str(path), start, table.checksums[start : start + step], options.size) for start in range(0, table.rows, step)
    ]
    weights = [len(task[2]) for task in tasks]
    found = run_stage("CHECK", _wrong_rows, tasks, jobs=options.jobs, weights=weights)
    wrong = [row for _, rows in found for row in rows]
    if wrong:
        path.unlink()
        raise UserError(
            f"{len(wrong)} image(s) in {path} do not have the checksum they were written with; it was removed: check "
            "disk and memory, then run the same command again"
        )
    _write_tables(folder, table, rows=True)
    if path == building:
        file = os.open(building, os.O_RDWR)
        try:
            header = files.npy_header((table.rows, 2, options.size, options.size))
            write_at(file, memoryview(header), 0)
            os.ftruncate(file, files.HEADER_BYTES + table.rows * files.row_bytes(options.size))
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(building, final)


def _wrong_rows(path: str, start: int, checksums: list[int], size: int) -> list[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        return [start + i for i, value in enumerate(checksums) if zlib.crc32(read_row(file, start + i, size)) != value]
    finally:
        os.close(file)


def _write_pairs(options: PrepareOptions, table: Table, work: WorkFolder, out: OutFolder) -> None:
    """WRITE: every kept pair once, from the aligned images."""
    for name in SPLITS:
        make_directory(out.root / name)
    out.remove_leftovers()
    expected = files.pair_file_bytes(options.size)
    images = work.aligned / files.STORE_PARTIAL
    if not images.exists():
        images = work.aligned / files.STORE
    present = sum(_is_written(files.pair_path(out.root, pair), expected) for pair in table.pairs)
    _need_space(out.root, (len(table.pairs) - present) * expected, "writing the pairs")
    if present:
        get_logger().info("%d pairs were written before", present)
    rows_are_final = images.name == files.STORE
    groups: dict[str, list[tuple[str, int, int]]] = {}
    checksums: dict[int, int] = {}
    for pair, working in zip(table.pairs, table.working_rows, strict=True):
        row1, row2 = (pair.row1, pair.row2) if rows_are_final else working
        groups.setdefault(pair.folder, []).append((str(files.pair_path(out.root, pair)), row1, row2))
        checksums[row1], checksums[row2] = table.checksums[pair.row1], table.checksums[pair.row2]
    tasks = []
    for group in groups.values():
        rows = sorted({row for _, row1, row2 in group for row in (row1, row2)})
        tasks.append((str(images), group, {row: checksums[row] for row in rows}, options.size))
    for _ in run_stage("WRITE", write_pair_files, tasks, jobs=options.jobs, weights=[len(t[1]) for t in tasks]):
        pass


def _is_written(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def write_pair_files(images: str, pairs: list[tuple[str, int, int]], checksums: dict[int, int], size: int) -> int:
    """Write the pairs of one sequence from its aligned images.

    Args:
        images: The image file.
        pairs: (path, row of the first, row of the second image).
        checksums: CRC-32 of each row that is needed; verified before anything is written.
        size: Rows and columns of an image.

    Returns:
        Number of files written; those that were whole before are left alone.

    Raises:
        OSError: The disk is full; the file that did not fit is removed.
    """
    expected = files.pair_file_bytes(size)
    todo = [pair for pair in pairs if not _is_written(Path(pair[0]), expected)]
    if not todo:
        return 0
    header = files.npy_header((2, 2, size, size))
    file = os.open(images, os.O_RDONLY)
    try:
        data = {}
        for row, checksum in checksums.items():
            data[row] = read_row(file, row, size)
            if zlib.crc32(data[row]) != checksum:
                raise UserError(f"row {row} of {images} does not have its checksum; remove that file and run again")
        for path, row1, row2 in todo:
            _write_pair(Path(path), (header, data[row1], data[row2]), expected)
    finally:
        os.close(file)
    return len(todo)


def _write_pair(path: Path, parts: tuple[bytes, bytes, bytes], expected: int) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    output = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            written = os.writev(output, parts)
            if written != expected:  # a short write: go on until it ends or says why it cannot
                write_at(output, memoryview(b"".join(parts))[written:], written)
        finally:
            os.close(output)  # network file systems report a full disk here
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename = str(path)
        raise


# Manifest, summary, removal -----------------------------------------------------------------------------------------


def _versions(options: PrepareOptions) -> dict[str, str]:
    import rasterio

    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rasterio": rasterio.__version__,
        "gdal_of_rasterio": rasterio.__gdal_version__,
    }
    if options.warper == "gdal":
        from osgeo import gdal

        versions["gdal"] = gdal.__version__
    return versions


def _manifest(
    options: PrepareOptions,
    plan: Plan,
    table: Table,
    dropped: dict[str, int],
    problems: list[Problem],
    aligned: list[AlignedSequence],
    fingerprint: dict[str, Any],
) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    for name in SPLITS:
        labels = [pair.label for pair in table.pairs if pair.split == name]
        total, flood = plan.candidates[name]
        counts[name] = {
            "sequences": len(plan.split.folders[name]),
            "candidate_pairs": total,
            "candidate_flood": flood,
            "pairs": len(labels),
            "flood": sum(labels),
            "no_flood": len(labels) - sum(labels),
            "flood_fraction": round(sum(labels) / len(labels), 6) if labels else None,
        }
    status = Counter(line[5] for line in table.images)
    return {
        "format": files.FORMAT,
        "status": files.COMPLETE,
        "fingerprint": fingerprint,
        "dataset": "sen12flood",
        "layout": options.layout,
        "channels": list(BANDS),
        "unit": "linear power (sigma0); 0 = not covered",
        "dtype": "float32",
        "image_shape": [2, options.size, options.size],
        "images": table.rows,
        "bytes_per_pair_file": files.pair_file_bytes(options.size) if options.layout == "npy" else None,
        "options": {
            "layout": options.layout,
            "warper": options.warper,
            "resampling": options.resampling,
            "size": options.size,
            "max_zeros": MAX_ZEROS,
            "skip_bad": options.skip_bad,
        },
        "split": plan.split.origin,
        "counts": counts,
        "frames": dict(sorted(status.items())),
        "dropped_pairs": dropped,
        "grids_from_polygon": [r.folder for r in aligned if r.grid is not None and r.grid["origin"] == "polygon"],
        "tiles_not_in_s1list": sum(result.unlisted for result in aligned),
        "problems": [problem.as_dict() for problem in sorted(problems)],
        "versions": _versions(options),
    }


def _check_complete(options: PrepareOptions, out: OutFolder) -> Summary:
    """A finished folder: verify the files, and say that there is nothing to do."""
    manifest = out.manifest
    assert manifest is not None
    again = "give --overwrite to make it again"
    pairs = files.read_pairs(out.root)
    if options.layout == "store":
        wanted = files.HEADER_BYTES + int(manifest["images"]) * files.row_bytes(options.size)
        if not _is_written(out.root / files.STORE, wanted):
            raise UserError(f"{out.root / files.STORE} is missing or has not {wanted} bytes; {again}")
    else:
        expected = files.pair_file_bytes(options.size)
        wrong = [pair for pair in pairs if not _is_written(files.pair_path(out.root, pair), expected)]
        if wrong:
            raise UserError(
                f"{len(wrong)} of {len(pairs)} pairs in {out.root} are missing or have not {expected} bytes, such as "
                f"{wrong[0].name}.npy; {again}"
            )
    get_logger().info("%s is complete and its %d pairs have the right size; %s", out.root, len(pairs), again)
    if manifest["options"]["skip_bad"] != options.skip_bad:
        manifest["options"]["skip_bad"] = options.skip_bad
        write_json(out.root / files.MANIFEST, manifest)
    return Summary(manifest, [Problem(p["kind"], p["where"], p["message"]) for p in manifest["problems"]])


def _keep_aligned(options: PrepareOptions, table: Table, work: WorkFolder, manifest: dict[str, Any]) -> None:
    """Turn the intermediate images into a store of their own, which the loader can read too."""
    _finish_store(work.aligned, options, table)
    content = {**manifest, "layout": "store", "bytes_per_pair_file": None}
    write_json(work.aligned / files.MANIFEST, content)


def _clean_up(options: PrepareOptions, work: WorkFolder) -> None:
    """Remove what is no longer needed: everything of the work folder, or with --keep-intermediate nothing."""
    log = get_logger()
    if options.keep_intermediate:
        log.info("intermediate files stay in %s", work.root)
        return
    work.forget_records()
    foreign = work.remove_raw(list(work.state.get("extracting", [])))
    if foreign:
        log.warning("%s holds %d file(s) that this command did not create; they stay", work.raw, foreign)
    work.remove()


def _show(problems: list[Problem]) -> None:
    log = get_logger()
    for problem in problems[:SHOWN_PROBLEMS]:
        log.warning("  %s", problem)
    if len(problems) > SHOWN_PROBLEMS:
        log.warning("  ... and %d more; the manifest lists all", len(problems) - SHOWN_PROBLEMS)


def _report(summary: Summary) -> None:
    log = get_logger()
    counts = summary.manifest["counts"]
    for name in SPLITS:
        row = counts[name]
        share = f"{100 * row['flood_fraction']:.1f} %" if row["pairs"] else "-"
        log.info(
            "%s: %d pairs of %d candidates, %d flood (%s), %d no flood",
            name, row["pairs"], row["candidate_pairs"], row["flood"], share, row["no_flood"],
        )  # fmt: skip
        if row["pairs"] != EXPECTED_PAIRS[name]:
            log.warning("the full data set gives %d %s pairs, this one %d", EXPECTED_PAIRS[name], name, row["pairs"])
    if summary.manifest["dropped_pairs"]:
        dropped = ", ".join(f"{count} {reason}" for reason, count in summary.manifest["dropped_pairs"].items())
        log.info("pairs left out: %s", dropped)
    log.info("images: %d distinct in the pairs", summary.manifest["images"])
