"""Where audio lies in other files: the members of a tar, and the end that a file's own header declares.

What containers declare about where their audio ends, so that a file that was cut off is known as one.

libsndfile takes what is there for the whole. Programs that write into a pipe do not know the size and leave a
placeholder, which it takes for many things; such files are read to their end.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from tqdm import tqdm

from ..system.errors import ManifestError
from ..system.messages import counted, shown

# (offset, count) -> bytes of the file; fewer at its end
Read = Callable[[int, int], bytes]
_MAX_CHUNKS = 1000
_MAX_PAGE = 27 + 255 + 255 * 255  # the largest page of an Ogg stream
_LAST_PAGE = 4  # flag of an Ogg page
_W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
_LONG = 1 << 62  # no size of 64 bits is meant that is larger
Order = Literal["little", "big"]


class Declared(NamedTuple):
    """The first byte behind the audio by what its header says; None where it does not say.

    `repair` is what a header with a placeholder should have, and where: offset and bytes.
    """

    end: int | None = None
    repair: tuple[int, bytes] | None = None


class FileWindow(io.RawIOBase):
    """`size` bytes of an open file from `offset` on, as a file of their own.

    `repair` (offset and bytes) stands in place of what is there. `failure` is the error of a read that did not work: a
    decoder in C only sees that nothing came.
    """

    def __init__(self, file: Any, offset: int, size: int):
        super().__init__()
        self._file, self._offset, self._size, self._position = file, offset, size, 0
        self.repair: tuple[int, bytes] | None = None
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader gives no other buffer
        data = self.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def read_at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on; fewer at the end, and none after an error."""
        count = max(0, min(count, self._size - offset))
        try:
            self._file.seek(self._offset + offset)
            data = self._file.read(count)
        except Exception as error:
            self.failure = error
            return b""
        if self.repair is not None:
            place, new = self.repair[0] - offset, self.repair[1]
            if -len(new) < place < len(data):
                kept = new[max(0, -place) : len(data) - place]
                place = max(0, place)
                data = data[:place] + kept + data[place + len(kept) :]
        return data


def declared(read: Read, size: int) -> Declared:
    """What the header of a file of `size` bytes says about its end.

    WAV (RIFF, RIFX, RF64, BW64), W64, AIFF and AIFC, AU, CAF, NIST SPHERE, MP3 with a Xing header, and Ogg, which ends
    in a page that says so: without that page the end is one byte behind the file's.
    """
    start = _behind_id3(read)
    head = read(start, 16)
    match head[:4]:
        case b"RIFF" | b"RIFX" | b"RF64" | b"BW64":
            data = _in_chunks(read, start, b"data", "big" if head[:4] == b"RIFX" else "little", size)
        case b"riff":
            data = _in_w64(read, start, size)
        case b"FORM" if read(start + 8, 3) == b"AIF":
            data = _in_chunks(read, start, b"SSND", "big", size)
        case b".snd" | b"dns.":
            data = _in_au(head, start)
        case b"caff":
            data = _in_caf(read, start)
        case b"NIST":
            return Declared(_nist_end(read, start))
        case b"OggS":
            return Declared(_ogg_end(read, size))
        case _:
            return Declared(_mp3_end(read, start, size) if head[:1] == b"\xff" else None)
    if data is None:
        return Declared()
    if data.length is not None:
        return Declared(data.place + data.length)
    length = min(max(0, size - data.place), (1 << 8 * data.width) - 1)
    return Declared(None, (data.field, length.to_bytes(data.width, data.order)))


class _Data(NamedTuple):
    """The part with the samples: from where its length (None: not known) counts, and how that is written where."""

    place: int
    length: int | None
    field: int
    width: int
    order: Order


def _behind_id3(read: Read) -> int:
    """Where the file proper begins: behind an ID3 tag, if there is one."""
    head = read(0, 10)
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    length = 0
    for byte in head[6:]:
        length = length << 7 | byte & 0x7F
    return 10 + length


def _is_placeholder(length: int) -> bool:
    """Whether a size of 32 bits stands for "not known": all, or half of what fits, give or take a header."""
    return length >= 0xFFFF_F000 or 0x7F00_0000 <= length <= 0x8000_1000


def _in_chunks(read: Read, start: int, wanted: bytes, order: Order, size: int) -> _Data | None:
    """RIFF and its kin, AIFF: chunks of a name, a size of 32 bits and so many bytes, evened out."""
    total = int.from_bytes(read(start + 4, 4), order)
    position, long = start + 12, None
    for _ in range(_MAX_CHUNKS):
        head = read(position, 8)
        if len(head) < 8:
            return None
        length, field = int.from_bytes(head[4:], order), position + 4
        position += 8
        if head[:4] == b"ds64":
            long = (int.from_bytes(read(position + 8, 8), "little"), position + 8)
        elif head[:4] == wanted:
            if length == 0xFFFF_FFFF and long is not None:
                return _Data(position, long[0] if 0 < long[0] < _LONG else None, long[1], 8, "little")
            # Nothing is in it, or nobody came back to say how much: then the whole's size is wrong, too.
            nothing = length == 0 and start + 8 + total + total % 2 >= size > position and not _is_placeholder(total)
            known = nothing or not (length == 0 or _is_placeholder(length))
            return _Data(position, length if known else None, field, 4, order)
        position += length + length % 2
    return None


def _in_w64(read: Read, start: int, size: int) -> _Data | None:
    total = int.from_bytes(read(start + 16, 8), "little")
    position = start + 40
    for _ in range(_MAX_CHUNKS):
        head = read(position, 24)
        length = int.from_bytes(head[16:], "little")
        if len(head) < 24:
            return None
        if head[:16] == _W64_DATA:
            nothing = length <= 24 and size <= total < _LONG
            return _Data(position, length if nothing or 24 < length < _LONG else None, position + 16, 8, "little")
        if length < 24:
            return None
        position += -(-length // 8) * 8
    return None


def _in_au(head: bytes, start: int) -> _Data | None:
    order: Order = "big" if head[:1] == b"." else "little"
    place, length = (int.from_bytes(head[at : at + 4], order) for at in (4, 8))
    return _Data(start + place, None if length == 0 or _is_placeholder(length) else length, start + 8, 4, order)


def _in_caf(read: Read, start: int) -> _Data | None:
    position = start + 8
    for _ in range(_MAX_CHUNKS):
        head = read(position, 12)
        if len(head) < 12:
            return None
        length = int.from_bytes(head[4:], "big", signed=True)
        if head[:4] == b"data":
            return _Data(position + 12, length if length > 0 else None, position + 4, 8, "big")
        if length < 0:
            return None
        position += 12 + length
    return None


def _nist_end(read: Read, start: int) -> int | None:
    fields = {}
    try:
        header = int(read(start + 8, 8))
        for line in read(start + 16, min(header, 1 << 16)).split(b"\n"):
            name, *kind = line.split(None, 2)
            if name == b"end_head":
                break
            fields[name] = kind[-1]
        if fields.get(b"sample_coding", b"pcm") not in (b"pcm", b"ulaw", b"alaw"):
            return None  # packed: shorter than its samples
        samples, channels, width = (
            int(fields.get(name, b"1")) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")
        )
    except (ValueError, IndexError):
        return None
    return start + header + samples * channels * width if b"sample_count" in fields else None


def _ogg_end(read: Read, size: int) -> int | None:
    first = max(0, size - _MAX_PAGE)
    tail = read(first, _MAX_PAGE)
    place = len(tail)
    while (place := tail.rfind(b"OggS", 0, place)) >= 0:
        head = tail[place : place + 27]
        if len(head) < 27:
            return size + 1
        if head[4] != 0 or head[5] > 7:
            continue  # audio that looks like the beginning of a page
        lengths = tail[place + 27 : place + 27 + head[26]]
        end = first + place + 27 + head[26] + sum(lengths)
        if len(lengths) < head[26]:
            return max(end, size + 1)
        return end if end > size or head[5] & _LAST_PAGE else size + 1
    return None  # something else follows


def _mp3_end(read: Read, start: int, size: int) -> int | None:
    frame = read(start, 200)
    places = [place for name in (b"Xing", b"Info") if (place := frame.find(name)) >= 0]
    if not places or not frame[places[0] + 7] & 2:
        return None
    counted = places[0] + 8 + (4 if frame[places[0] + 7] & 1 else 0)
    end = start + int.from_bytes(frame[counted : counted + 4], "big")
    # Some encoders count a tag or the first frame, others do not; what is missing less shows when it is decoded.
    return end if end - size > (end - start) // 100 else None


class TarMember(NamedTuple):
    """A file in a tar: its bytes lie at `offset` as they are, unless `problem` says why they do not."""

    name: str
    offset: int
    size: int
    problem: str | None = None


def tar_members(path: Path, progress: bool = False) -> Iterator[TarMember]:
    """Files of an uncompressed tar, in order; links to a file behind them, with the place of what they lead to.

    Tars put one behind the other are read to the end. Raises `ManifestError` for what is no tar or is cut off.
    """
    places: dict[str, TarMember] = {}
    links: list[tuple[str, str]] = []
    size, position = path.stat().st_size, 0
    bar = tqdm(desc="Reading headers", disable=not progress, unit="file")
    with open(path, "rb") as file, bar:
        while position < size:
            file.seek(position)
            try:
                archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it closes nothing of ours)
                for entry in archive:
                    bar.update()
                    name = os.path.normpath(entry.name)
                    if entry.islnk():
                        links.append((name, os.path.normpath(entry.linkname)))
                    elif entry.issym():
                        links.append((name, os.path.normpath(os.path.join(os.path.dirname(name), entry.linkname))))
                    elif entry.isreg():
                        member = TarMember(name, entry.offset_data, entry.size, _problem(entry))
                        if member.problem is None and member.offset + member.size > size:
                            raise tarfile.ReadError("unexpected end of data")
                        places.setdefault(name, member)
                        yield member
            except tarfile.TarError as error:
                raise _no_tar(path, file, len(places), error) from error
            # It ends in blocks of zeros, or in front of what is no header: another tar, or damage.
            if (following := _behind_zeros(file, archive.offset)) == position:
                raise _no_tar(path, file, len(places), "unexpected data")
            position = following
    for name, target in links:
        seen = set()
        while target not in places and target in dict(links) and target not in seen:
            seen.add(target)
            target = dict(links)[target]
        if (found := places.get(target)) is None:
            yield TarMember(name, 0, 0, f"is a link to {shown(target)}, which is not in the tar")
        else:
            yield found._replace(name=name)


def _problem(entry: tarfile.TarInfo) -> str | None:
    sparse: Any = entry.sparse  # (offset, bytes) of what is there
    stretches = [stretch for stretch in sparse or () if stretch[1]]
    if entry.issparse() and stretches != [(0, entry.size)]:
        return "is stored with holes (tar -S), so that it cannot be read where it lies"
    return None


def _behind_zeros(file: IO[bytes], position: int) -> int:
    """Where the next block that is not all zeros begins; the end of the file where there is none."""
    file.seek(position)
    while block := file.read(1 << 20):
        if (rest := block.lstrip(b"\0")) != b"":
            return position + (len(block) - len(rest)) // 512 * 512
        position += len(block)
    return position


def _no_tar(path: Path, file: IO[bytes], members: int, error: Any) -> ManifestError:
    file.seek(0)
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
    head = file.read(8)
    if kind := next((kind for magic, kind in packed.items() if head.startswith(magic)), None):
        advice = f"Decompress it first (it is {kind}), or unpack it and pass the folder."
    elif members:
        advice = f"It is cut off or damaged behind {counted(members, 'file')}: copy it again."
    else:
        advice = "It is cut off, or no tar: copy it again."
    return ManifestError(f"{path}: cannot be read as a tar without compression ({error}). {advice}")


__all__ = ["Declared", "FileWindow", "Read", "TarMember", "declared", "tar_members"]
