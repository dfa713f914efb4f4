"""A shard's members, read and judged: the one place that says what a sample is, and what a tar file may not be.

tarfile takes a header that it cannot read, and a file that ends too soon, for the end of the archive. Here they are
errors. Nothing is unpickled, and sizes are held against the file's own length before memory is taken.
"""

from __future__ import annotations

import io
import re
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from mvar_lightning.data.images import SUFFIXES, SampleError
from mvar_lightning.errors import UserError

LABEL = "cls"
MAX_LABEL = 32
"""Bytes of a label; more is no number."""

MAX_PICTURE = 1 << 29
"""Bytes of an encoded picture."""

_MAX_EXTRA = 1 << 16
_EXTRA = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")
# A key ends at the first dot of the file's name. What begins with a dot (`._0001.jpg`: a Mac wrote it) has none.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_META = re.compile(r"__[^/]*__(/|$)")  # webdataset's own members

BESIDE = "; the members of a key stand side by side, as `tar --sort=name` puts them"


class RawSample(NamedTuple):
    """A sample as it lies in the shard, cheap to pass by undecoded: encoded image and label bytes."""

    shard: str
    key: str
    image: bytes
    label: bytes
    number: int = 0
    """Place in the shard. Keys may come again."""
    fault: str = ""
    """Why its members are no sample."""


class TarDamage(Exception):
    """The archive cannot be read any further; the message says why."""


class _EndMark(tarfile.HeaderError):
    """A block of zeros."""


class Header(tarfile.TarInfo):
    """For tarfile's ``tarinfo``. Raises tarfile.ReadError for what is no header, but for the end mark."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it is cut off inside a header" if buf else "it is cut off, no end mark")
        if not any(buf):
            raise _EndMark("end mark")
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is damaged or cut off (no header: {error})") from None
        if header.size < 0 or (header.type in _EXTRA and header.size > _MAX_EXTRA):
            raise tarfile.ReadError(f"it has a header of {header.size} bytes")
        return header


class TarReader:
    """Files of a tar archive in order, however large it is.

    Iterating raises TarDamage where the archive cannot be read any further, and UserError as the file itself does.

    Args:
        file: open at its beginning; compressed or not.
        inside: first byte and end of an archive that lies in the file; such a one needs no end mark.
    """

    def __init__(self, file: IO[bytes], inside: tuple[int, int] | None = None) -> None:
        self.file, self.start, self.end, self.needs_mark = file, 0, sys.maxsize, inside is None
        self.is_plain = file.seekable()
        if inside is not None:
            self.start, self.end = inside
        elif self.is_plain:
            self.is_plain = not file.read(6).startswith(_COMPRESSED)
            self.end = file.seek(0, io.SEEK_END) if self.is_plain else self.end
        if file.seekable():
            file.seek(self.start)

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        with _damage():
            first = self._opened()
        yield from () if first is None else (first,)
        while first is not None and (member := self._next()) is not None:
            yield member

    def _opened(self) -> tarfile.TarInfo | None:
        """The first member. tarfile reads it as it opens the file."""
        try:
            if self.is_plain:
                self.tar = tarfile.TarFile(fileobj=self.file, tarinfo=Header)
            else:
                self.tar = tarfile.TarFile.open(fileobj=self.file, mode="r|*", tarinfo=Header)
        except _EndMark:
            self._ended()
            return None
        except tarfile.ReadError as error:
            raise tarfile.ReadError(f"not a tar file, or damaged from its start on ({error})") from None
        self.stream = self.tar.fileobj
        return self._checked(self.tar.next(), self.start)

    def _next(self) -> tarfile.TarInfo | None:
        """Not tarfile's `next`, which keeps every header that it has seen and ends at whatever it cannot read."""
        with _damage():
            before = self.tar.offset
            if before >= self.end and not self.needs_mark:
                return None
            if before > self.end:
                raise tarfile.ReadError("it is cut off (inside a member)")
            if before != self.stream.tell():
                self.stream.seek(before)
            try:
                return self._checked(Header.fromtarfile(self.tar), before)
            except _EndMark:
                self._ended()
            return None

    def _checked(self, member: tarfile.TarInfo | None, before: int) -> tarfile.TarInfo | None:
        if member is not None and (self.tar.offset <= before or member.size < 0):
            raise tarfile.ReadError(f"it has a header of {member.size} bytes")
        if member is not None and member.isreg() and not member.issparse() and self._behind(member) > self.end:
            raise tarfile.ReadError(f"it is cut off inside {member.name}")
        return member

    @staticmethod
    def _behind(member: tarfile.TarInfo) -> int:
        return member.offset_data + member.size

    def _ended(self) -> None:
        """Behind its end mark an archive has nothing but zeros."""
        while self.is_plain and self.needs_mark and (block := self.file.read(1 << 16)):
            if any(block):
                raise tarfile.ReadError("it goes on behind its end mark, as two archives in a row do")

    def data(self, member: tarfile.TarInfo) -> bytes:
        """The bytes of the member that was just given."""
        with _damage():
            if self.stream.tell() != member.offset_data:
                self.stream.seek(member.offset_data)
            data = self.stream.read(member.size)
            if len(data) < member.size:
                raise tarfile.ReadError(f"it is cut off inside {member.name}")
            return data


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged header makes tarfile fail in any way
        known = isinstance(error, OSError | tarfile.TarError | EOFError)
        reason = getattr(error, "strerror", None) or (str(error) if known else "") or type(error).__name__
        raise TarDamage(reason) from error


@dataclass
class _Group:
    """The members of a key, as they come."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""

    def add(self, reader: TarReader, member: tarfile.TarInfo, suffix: str, load: bool) -> None:
        most = MAX_LABEL if suffix == LABEL else MAX_PICTURE
        if suffix in self.parts:
            self.fault = self.fault or f"has two members {member.name}"
        elif not member.isreg() or member.issparse():
            what = "a link" if member.islnk() or member.issym() else "no plain file"
            way_out = " (`tar --hard-dereference` stores files)" if member.islnk() else ""
            self.fault = self.fault or f"member {member.name} is {what}{way_out}"
            self.parts[suffix] = b""
        elif member.size > most:
            self.fault = self.fault or f"member {member.name} has {member.size} bytes, more than {most}"
            self.parts[suffix] = b""
        else:
            self.parts[suffix] = reader.data(member) if load else b""

    @property
    def picture(self) -> str | None:
        return next((suffix for suffix in SUFFIXES if suffix in self.parts), None)

    @property
    def is_whole(self) -> bool:
        return LABEL in self.parts and self.picture is not None

    def sample(self, shard: str, number: int) -> RawSample:
        lacks = "no label (KEY.cls)" if self.picture is not None else f"no picture (KEY.{', KEY.'.join(SUFFIXES)})"
        fault = self.fault or ("" if self.is_whole else f"has {lacks}{BESIDE}")
        image = self.parts[self.picture] if self.picture is not None else b""
        return RawSample(shard, self.key, image, self.parts.get(LABEL, b""), number, fault)


def read_samples(file: IO[bytes], shard: str, load: bool = True) -> Iterator[RawSample]:
    """Samples of a tar file in order: what stands side by side under one key. Others of its members are not read.

    Args:
        file: open at its beginning.
        shard: its name, for the samples.
        load: read the bytes, too; without, only headers are read.

    Raises:
        TarDamage: after the samples before the damage, and for a file without samples.
        UserError: as the file does.
    """
    number, group, stray = 0, None, ""
    reader = TarReader(file)
    try:
        for member in reader:
            key, suffix = split_name(member.name)
            if suffix not in (*SUFFIXES, LABEL) or member.isdir():
                stray = stray or (member.name if suffix.rpartition(".")[2] in (*SUFFIXES, LABEL) else "")
                continue
            if group is None or group.key != key:
                if group is not None:
                    yield group.sample(shard, number)
                    number += 1
                group = _Group(key)
            group.add(reader, member, suffix, load)
    except TarDamage:
        if group is not None and group.is_whole:
            yield group.sample(shard, number)
        raise
    if group is None:
        raise TarDamage(_why_empty(stray))
    yield group.sample(shard, number)


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix (in lower case) of a member; both empty for what belongs to no sample."""
    found = None if _META.match(name) else _NAME.fullmatch(name)
    return (found[1], found[2].lower()) if found else ("", "")


def _why_empty(stray: str) -> str:
    if not stray:
        return f"it holds no samples (members KEY.{LABEL} with KEY.{', KEY.'.join(SUFFIXES)})"
    key, suffix = split_name(stray)
    return f"it holds no samples: a key ends at its first dot, so {stray} is {suffix!r} of key {key!r}; rename them"


def label_of(data: bytes) -> int:
    """The label of a sample. Raises SampleError where it is no number."""
    try:
        return int(data[: MAX_LABEL + 1].replace(b"_", b"?"))  # Python would read 1_0 as 10
    except ValueError:
        raise SampleError(f"label {data[:20]!r} is not a number") from None
