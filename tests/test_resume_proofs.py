"""What an interrupted save keeps is proven before it is used, byte by byte."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from qmoe_rules import SourceError, save
from qmoe_rules.extents import lay_out
from qmoe_rules.journal import Journal
from qmoe_rules.slabs import Place
from qmoe_rules.writing import write_data
from tests.interruptions import expected, interrupt, kept, resumed
from tests.saves import SLABS, planned, snapshot, with_quantizer


def test_nothing_is_kept_of_a_source_that_was_cut_off(
    source: Path, path: Path, tmp_path: Path
) -> None:
    """Slabs of lost pages have checksums too; the source may come back as if nothing had been."""
    data, number = source.with_name("model.onnx.data"), SLABS // 2
    content, status = data.read_bytes(), data.stat()

    def cut_off(now: int) -> None:
        if now == number:
            os.truncate(data, 5000)

    with pytest.MonkeyPatch.context() as patch:
        with_quantizer(patch, cut_off)
        with pytest.raises(SourceError):
            save(planned(source), path, workers=2, resume=True)
    assert not list(tmp_path.rglob(".qmoe-*"))
    with data.open("r+b") as file:
        file.write(content)
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    save(planned(source), path, resume=True)
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_slab_that_may_be_wrong_is_not_in_the_journal(source: Path, tmp_path: Path) -> None:
    def lost() -> None:
        raise SourceError("lost")

    with Journal(tmp_path) as journal, pytest.raises(SourceError, match="lost"):
        write_data(lay_out(planned(source)), tmp_path, workers=2, journal=journal, check=lost)
    assert (tmp_path / "journal").read_bytes() == b""


@pytest.mark.parametrize("part", range(8))
def test_byte_that_has_changed_is_written_again(
    source: Path, path: Path, tmp_path: Path, part: int
) -> None:
    """One byte of the weights or of the scales of the first or the last expert of a layer."""
    interrupt(planned(source), path, SLABS - 1)
    planned_ones = [each for each in lay_out(planned(source)) if "moe" in str(each.value.name)]
    extent = planned_ones[part]
    file = kept(tmp_path) / extent.file
    content = bytearray(file.read_bytes())
    content[extent.offset + part] ^= 1
    file.write_bytes(content)
    assert resumed(planned(source), path) == 2
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_data_file_that_is_gone_is_written_again(source: Path, path: Path, tmp_path: Path) -> None:
    interrupt(planned(source), path, 20, max_shard_size=300_000)
    for file in list(kept(tmp_path).glob("shard-*"))[1:]:
        file.unlink()
    assert SLABS - 20 <= resumed(planned(source), path, max_shard_size=300_000) <= SLABS
    assert snapshot(path.parent) == expected(source, tmp_path / "expected", max_shard_size=300_000)


def _torn(journal: bytes) -> bytes:
    return journal[:-5]


def _torn_at_the_line(journal: bytes) -> bytes:
    return journal[:-1]


def _garbage_behind(journal: bytes) -> bytes:
    return journal + b"\xff\x00\xfe [[1, 2"


def _garbage_before(journal: bytes) -> bytes:
    return b"\xff\x00 \n \n1\n x\n" + journal


def _wrong_sum(journal: bytes) -> bytes:
    lines = journal.split(b"\n")
    return b"\n".join([lines[0] + b"1", *lines[1:]])


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (_torn, 1),
        (_torn_at_the_line, 1),
        (_garbage_behind, 0),
        (_garbage_before, 0),
        (_wrong_sum, 1),
        (lambda journal: journal * 2, 0),
        (lambda journal: b"", 20),
        (lambda journal: bytes(len(journal)), 20),
    ],
)
def test_damaged_journal_costs_work_and_no_more(
    source: Path, path: Path, tmp_path: Path, damage: Callable[[bytes], bytes], lost: int
) -> None:
    interrupt(planned(source), path, 20)
    journal = kept(tmp_path) / "journal"
    journal.write_bytes(damage(journal.read_bytes()))
    interrupt(planned(source), path, 5)  # what is written behind the damage counts
    assert resumed(planned(source), path) == SLABS - 25 + lost
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_journal_without_a_file_begins_anew(source: Path, path: Path, tmp_path: Path) -> None:
    interrupt(planned(source), path, 20)
    (kept(tmp_path) / "journal").unlink()
    assert resumed(planned(source), path) == SLABS
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_journal_knows_places_by_their_bytes(tmp_path: Path) -> None:
    places = (Place("weights", "shard-0", 4, 4), Place("scales", "shard-0", 0, 2))
    (tmp_path / "shard-0").write_bytes(b"ab..cdef")
    with Journal(tmp_path) as journal:
        assert not journal.has(places)
        journal.record(places, zlib.crc32(b"abcdef"))  # in the wrong order
    with Journal(tmp_path) as journal:
        assert not journal.has(places)
        journal.record(places, zlib.crc32(b"cdefab"))
    with Journal(tmp_path) as journal:
        assert journal.has(places)
        assert not journal.has(places[:1])
    (tmp_path / "shard-0").write_bytes(b"ab..cdeg")
    with Journal(tmp_path) as journal:
        assert not journal.has(places)
