"""Files made to harm or to confuse, and what a reader says to each: the table of `conversion/test_hostile.py`."""

import json
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PARITY = Path(__file__).parent / "fixtures" / "parity"
TINY = PARITY / "spidr-tiny"
FAIRSEQ = PARITY / "dinosr-fairseq" / "checkpoint.ckpt"
CONFIG = json.loads((TINY / "config.json").read_text())


def archive(path: Path, body: bytes, packing: int = zipfile.ZIP_STORED, **data: bytes) -> None:
    """A zip checkpoint whose pickle is written by hand."""
    with zipfile.ZipFile(path, "w", packing) as file:
        file.writestr("a/data.pkl", body)
        file.writestr("a/version", "3\n")
        file.writestr("a/byteorder", sys.byteorder)
        for name, content in (data or {"0": b"\0" * 16}).items():
            file.writestr(f"a/data/{name}", content)


def shared(depth: int = 60) -> list:
    """Two to the power of `depth` parts, of which only `depth` are different."""
    part: list = []
    for _ in range(depth):
        part = [part, part]
    return part


def deep(depth: int = 100_000) -> bytes:
    """A list in a list in a list."""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def shared_tuple(after: bytes, depth: int = 60) -> bytes:
    """A tuple of two references to the same tuple of two references and so on; then opcodes that use it."""
    return b"\x80\x02)" + b"2\x86" * depth + after


def dictionary(*keys: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(key + b"K\x01" for key in keys) + b"u."


def number(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(offset: int = 0, size: tuple = (4,), stride: tuple = (1,), numel: int = 4, key: str = "0") -> bytes:
    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(f"I{value}\n".encode() for value in values) + b"t"

    storage = b"(S'storage'\nctorch\nFloatStorage\n" + f"S'{key}'\nS'cpu'\nI{numel}\n".encode() + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + f"I{offset}\n".encode()
        + numbers(size)
        + numbers(stride)
        + b"I00\n}tR"
    )


def state_dict(**tensors: bytes) -> bytes:
    entries = b"".join(f"S'{name}'\n".encode() + body for name, body in tensors.items())
    return b"}(" + entries + b"u."


def hand_written() -> dict[str, tuple[bytes, str]]:
    """Pickles in a zip archive, with what is said about them."""
    many = b"".join(b"K\x01" for _ in range(1_200_000))
    big_list = b"\x80\x02](" + b"K\x01" * 50_000 + b"eq\x00" + b"cbuiltins\nlist\nh\x00\x85R0" * 50_000 + b"."
    return {
        "a list 100 000 deep": (deep(), "holds a list"),
        "a shared tuple as key": (shared_tuple(b"}2K\x01s."), "as long as no checkpoint's|not a checkpoint|damaged"),
        "a dictionary with a shared tuple as key": (
            b"\x80\x02}" + shared_tuple(b"K\x01s.")[2:],
            "keys as long as no checkpoint's",
        ),
        "a set of shared tuples": (b"\x80\x04\x8f(" + shared_tuple(b"\x90.")[2:], "keys as long as no checkpoint's"),
        "a frozen set of shared tuples": (b"\x80\x04(" + shared_tuple(b"\x91.")[2:], "keys as long"),
        "a set called with shared tuples": (
            b"\x80\x02cbuiltins\nset\n(](" + shared_tuple(b"e", 60)[2:] + b"tR.",
            "keys as long",
        ),
        "keys with one hash": (
            dictionary(*(number(i * (2**61 - 1)) for i in range(1, 30_000))),
            "numbers for keys that no checkpoint has",
        ),
        "a million numbers": (b"\x80\x02](" + many + b"e.", "more than any checkpoint holds"),
        "a list copied again and again": (big_list, "more than any checkpoint holds"),
        "a text of a whole tree": (
            b"\x80\x02cbuiltins\nstr\n(" + pickle.dumps(shared(), 2)[2:-1] + b"tR.",
            "holds an object of builtins.str",
        ),
        "a device of a whole tree": (
            b"\x80\x02ctorch\ndevice\n(" + pickle.dumps(shared(), 2)[2:-1] + b"tR.",
            "holds a str",
        ),
        "a text of 4 GB that is not there": (b"\x80\x04\x8d" + struct.pack("<Q", 4 << 30) + b"abc.", "damaged"),
        "a text of 2 ** 62 bytes that is not there": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.", "damaged"),
        "5 GB of bytes that are not there": (b"\x80\x05\x96" + struct.pack("<Q", 5 << 30) + b"abc.", "damaged"),
        "an unending line": (b"\x80\x02S'" + b"a" * 1000, "damaged"),
        "a number of 100 000 digits": (b"I" + b"9" * 100_000 + b"\n.", "damaged"),
        "a tensor that repeats one number": (
            state_dict(mask_embedding=tensor(size=(48, 10**9, 10**8), stride=(0, 0, 0))),
            "not those of SpidR's default sizes|do not fit",
        ),
        "a tensor of 100 dimensions": (state_dict(a=tensor(size=(1,) * 100, stride=(1,) * 100)), "described wrongly"),
        "a tensor beyond its data": (state_dict(a=tensor(offset=2)), "beyond its data"),
        "a storage of 10 ** 18 numbers": (state_dict(a=tensor(numel=10**18)), "missing or cut off"),
        "additions to a tensor": (
            state_dict(a=tensor(size=(10**6, 10**6), stride=(0, 0)))[:-2] + tensor() + b"(K\x01\x90.",
            "no set|damaged",
        ),
        "entries of a tensor": (tensor() + b"K\x00K\x01s.", "entries of something that has none"),
        "an unknown opcode": (b"\xff.", "no pickle has the byte 255"),
        "nothing": (b"", "damaged"),
        "names with line ends and colours": (
            state_dict(**{"mask_embedding": tensor(), r"a\n\x1b[31mred" + "x" * 5000: tensor()}),
            r"SpidR's default sizes|a\\n\\x1b\[31mred",
        ),
    }


def bomb(path: Path) -> None:
    """A gigabyte of zeros in a megabyte."""
    block = bytes(64 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("a/data.pkl", state_dict(mask_embedding=tensor(size=(1 << 28,), numel=1 << 28)))
        with file.open("a/data/0", "w", force_zip64=True) as entry:
            for _ in range(16):
                entry.write(block)


def pickle_bomb(path: Path) -> None:
    """A pickle that is small only while it is packed."""
    archive(path, b"\x80\x02](" + b"N" * (60 << 20) + b"e.", zipfile.ZIP_DEFLATED)


def overlapping(path: Path) -> None:
    """A thousand entries that are all the same bytes of the file."""
    archive(path, state_dict(a=tensor(size=(1 << 20,), numel=1 << 20)), **{"0": bytes(4 << 20)})
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    (start,) = struct.unpack("<I", data[end + 16 : end + 20])
    directory = data[start:end]
    name = b"a/data/0"
    first = directory.rindex(b"PK\x01\x02", 0, directory.index(name))
    entry = directory[first : directory.index(name) + len(name)]
    directory += b"".join(entry[:-4] + f"{i:04d}".encode() for i in range(1000))
    count = struct.pack("<H", directory.count(b"PK\x01\x02"))
    path.write_bytes(
        data[:start]
        + directory
        + data[end : end + 8]
        + count * 2
        + struct.pack("<I", len(directory))
        + data[end + 16 :]
    )


def crowded(path: Path) -> None:
    """An archive of 60 000 empty entries with long names."""
    with zipfile.ZipFile(path, "w") as file:
        for i in range(60_000):
            file.writestr(zipfile.ZipInfo(f"{'x' * 60}{i}"), b"")


def legacy_repeats(path: Path) -> None:
    """The older format: a thousand storages, each as long as the file."""
    header = b"".join(
        pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {}})
    )
    numel = 1 << 20
    bodies = [tensor(key=str(i), numel=numel).replace(b"\ntQ", b"\nNtQ") for i in range(1000)]
    names = {f"t{i}": body for i, body in enumerate(bodies)}
    path.write_bytes(header + state_dict(**names) + pickle.dumps([], 2) + bytes(4 * numel))


def tree_in_a_checkpoint(path: Path) -> None:
    """Shared parts in the settings of a whole fairseq checkpoint."""
    checkpoint = torch.load(FAIRSEQ, weights_only=True)
    checkpoint["cfg"]["model"]["w2v_path"] = shared()
    torch.save(checkpoint, path)


def loop_in_a_checkpoint(path: Path) -> None:
    """Settings that contain themselves."""
    checkpoint = torch.load(FAIRSEQ, weights_only=True)
    checkpoint["cfg"]["self"] = checkpoint["cfg"]
    torch.save(checkpoint, path)


VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 1e308, -1e308, 1e-320, 0.5, 2**31, 2**63, 2**64, 10**9, 10**400, -(10**400)),
    *("", "x", "9", "1e400", "\x1b[31m\n", "\0", "\ud800", "ü" * 300, "x" * 100_000, "spidr", "dinosr", "${model.x}"),
    *([], [[]], [None] * 3, [1, 2, 3], [[1, 2, 3]] * 7, [[10**9] * 3], ["a\n"], list(range(10_000))),
    *({}, {"a": None}, {"\n": {"\x1b": [{}]}}, {str(i): i for i in range(1000)}),
)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, left out, doubled, or taken from elsewhere."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(changed) or 1)
        length = chance.choice((1, 1, 2, 4, 30))
        match chance.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length] * chance.choice((1, 2, 50))
            case 3:
                other = chance.randrange(len(data))
                changed[at : at + length] = data[other : other + length]
            case 4:
                changed[at : at + 1] = chance.choice((b"(", b".", b"R", b"\x81", b"b", b"0", b"2", b"t", b"Q", b"\x8a"))
    return bytes(changed)


def with_other_values(tree: Any, chance: random.Random, values: tuple = VALUES) -> Any:
    """The tree with one of its parts replaced, left out or doubled."""
    if isinstance(tree, dict) and tree and chance.random() < 0.9:
        key = chance.choice(list(tree))
        match chance.randrange(8):
            case 0:
                return {name: value for name, value in tree.items() if name != key}
            case 1:
                return {**tree, key + chance.choice(("s", "\n", "_")): tree[key]}
            case _:
                return {**tree, key: with_other_values(tree[key], chance, values)}
    if isinstance(tree, list) and tree and chance.random() < 0.5:
        index = chance.randrange(len(tree))
        return [*tree[:index], with_other_values(tree[index], chance, values), *tree[index + 1 :]]
    return chance.choice(values)


def as_json(tree: Any, chance: random.Random) -> str:
    text = json.dumps(tree)
    for number in ("NaN", "Infinity", "-Infinity", "1e400", "9" * 5000):
        if chance.random() < 0.03:
            text = text.replace(": 0", f": {number}", 1)
    return text if chance.random() < 0.9 else text[: chance.randrange(len(text))]


def files() -> dict[str, tuple[Callable[[Path], object], str]]:
    """What makes a file, with what is said about it."""
    table: dict[str, tuple[Callable[[Path], object], str]] = {
        name: (lambda path, body=body: archive(path, body), said) for name, (body, said) in hand_written().items()
    }
    return table | {
        "shared parts 60 deep": (lambda path: torch.save(shared(), path), "holds a list"),
        "shared parts in the settings": (tree_in_a_checkpoint, "nested too deeply|too many"),
        "settings in themselves": (loop_in_a_checkpoint, "contain themselves"),
        "a gigabyte in a megabyte": (bomb, "far more when unpacked"),
        "a packed pickle": (pickle_bomb, "larger than 16 MiB|more than any checkpoint"),
        "overlapping entries": (overlapping, "far more when unpacked|damaged"),
        "60 000 entries": (crowded, "more files than any checkpoint"),
        "storages in the older format": (legacy_repeats, "cut off"),
        "an older pickle 100 000 deep": (lambda path: path.write_bytes(deep()), "not one that torch.save wrote"),
        "not a pickle": (lambda path: path.write_bytes(b"hello\n" * 1000), "no PyTorch checkpoint"),
    }


def configs() -> Iterator[tuple[str, str, str]]:
    """Name, text and message of configurations in SpidR's words, beside a good checkpoint."""
    large = {
        "encoder_num_layers": 10**6,
        "encoder_embed_dim": 48 * 10**9,
        "encoder_ff_interm_features": 10**9,
        "encoder_pos_conv_kernel": 10**9,
        "encoder_pos_conv_depth": 10**6,
        "codebook_size": 10**9,
        "extractor_conv_layer_config": [[10**9, 10**9, 10**9]] * 7,
    }
    for field, value in large.items():
        text = json.dumps({**CONFIG, "model": {**CONFIG["model"], field: value}})
        yield f"{field} of 1e9", text, f"`{field}` is .*are read"
        yield f"{field} as text", json.dumps({**CONFIG, "model": {**CONFIG["model"], field: "x\n" * 1000}}), field
        yield f"{field} as null", json.dumps({**CONFIG, "model": {**CONFIG["model"], field: None}}), field
    many = {**CONFIG["model"], "encoder_num_layers": 256, "num_codebooks": 256}
    yield "256 layers", json.dumps({**CONFIG, "model": many}), "configuration of another model|do not fit"
    yield (
        "300 000 convolutions",
        json.dumps({**CONFIG, "model": {**CONFIG["model"], "extractor_conv_layer_config": [[1, 1, 1]] * 300_000}}),
        "at most 64 convolutions",
    )
    for value in ("NaN", "Infinity", "-Infinity", "1e400"):
        text = json.dumps(CONFIG).replace('"ema_threshold": 1e-07', f'"ema_threshold": {value}')
        yield f"a threshold of {value}", text, "no finite number"
    yield "null", "null", "must hold a table"
    yield "a list", "[]", "must hold a table"
    yield "model is a list", '{"model": [1, 2]}', "must be a table"
    yield "run.model_type is a list", '{"run": {"model_type": ["\\u001b[31m"]}, "model": {}}', "objective must be"
    yield (
        "unknown field with line ends",
        json.dumps({"run": {"model_type": "spidr"}, "model": {"a\n\x1b[1m": 1}}),
        ("Unknown model field"),
    )
    yield "100 000 deep", "[" * 100_000, "nested too deeply"
    yield "100 000 deep in a table", '{"a":' * 100_000, "nested too deeply"
    yield "a number of a million digits", '{"a": ' + "9" * 1_000_000 + "}", "not valid JSON"
    yield "9 MB", '{"a": "' + "x" * (9 << 20) + '"}', "larger than 8 MiB"
    yield "cut off", json.dumps(CONFIG)[:50], "not valid JSON"
    yield "no text", "\udcff\udcfe", "not valid JSON"


def folder_configs() -> Iterator[tuple[str, dict, str]]:
    """Name, changed fields and message of config.json in a model folder."""
    for field in ("num_hidden_layers", "hidden_size", "intermediate_size", "codebook_size", "conv_pos_kernel_size"):
        yield f"{field} of 48e9", {field: 48 * 10**9}, "cannot be right"
        yield f"{field} as text", {field: "9" * 10_000}, "cannot be right"
    yield "conv_dim of 1e9", {"conv_dim": [10**9] * 7}, "conv_dim"
    for field in ("id2label", "label2id", "dtype", "architectures", "num_labels", "auto_map", "quantization_config"):
        for value in (None, 5, "x", [[]], {"a": None}):
            yield f"{field} as {value!r}", {field: value}, ""
    for field in ("objective", "hidden_act", "feat_extract_norm", "conv_bias", "conv_kernel"):
        for value in (None, [], {}, [{}], "\x1b[31m\n" * 500, 10**400):
            yield f"{field} as {str(value)[:10]!r}", {field: value}, "cannot be right|do not fit|digits|JSON"
    yield "another family", {"model_type": "hubert"}, "not hold a model of this family"
    yield "no family", {"model_type": None}, "not hold a model of this family"


def fairseq_settings() -> Iterator[tuple[str, dict, str]]:
    """Name, changed settings and message of fairseq checkpoints."""
    for field in ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "conv_pos", "codebook_size"):
        yield f"{field} of 48e9", {field: 48 * 10**9}, f"`{field}`"
        yield f"{field} as a list", {field: [[]]}, f"`{field}`"
        yield f"{field} as null", {field: None}, f"`{field}`"
        yield f"{field} infinite", {field: float("inf")}, f"`{field}`"
    texts = ("[(512,10,5)] * 10**9", "(" * 5000, "[" * 5000, "\n\x1b[31m" * 2000, "9" * 9000)
    for value in (*texts, [[10**9] * 3] * 7, {}, [[]]):
        yield f"conv_feature_layers as {str(value)[:20]!r}", {"conv_feature_layers": value}, "conv_feature_layers"
    yield "extractor_mode as a list", {"extractor_mode": [{}]}, "extractor_mode"
    yield "activation_fn of 10 000 characters", {"activation_fn": "\x1b" * 10_000}, "activation_fn"
    yield "activation_fn of a million values", {"activation_fn": list(range(50_000))}, "activation_fn"
    yield "freeze_teacher_step without a decimal form", {"freeze_teacher_step": -(10**5000)}, "freeze_teacher_step"
    yield "a reference to itself", {"encoder_layers": "${model.encoder_layers}"}, "`encoder_layers`"


def indexes() -> Iterator[tuple[str, str, str]]:
    """Name, text and message of the index of a model folder in several files."""
    for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "", "\0.safetensors", 5, None, ["x"]):
        yield f"a file named {name!r}", json.dumps({"weight_map": {"a": name}}), "names of files in its folder"
    text = json.dumps({"weight_map": {"a": "\x1b[31m\n.safetensors"}})
    yield "a file that is not there", text, r"has no \\x1b\[31m\\n"
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}'):
        yield text, text, "names of files in its folder"
    yield "[]", "[]", "must hold a table"
    yield "NaN", '{"weight_map": NaN}', "no finite number"
    yield "deep", "[" * 100_000, "nested too deeply"


def safetensors_files(folder: Path) -> Iterator[tuple[str, bytes, str]]:
    """Name, bytes and message of weights in a model folder."""
    save_file({"a": torch.zeros(3)}, folder / "one.safetensors")
    whole = (folder / "one.safetensors").read_bytes()
    (folder / "one.safetensors").unlink()
    yield "empty", b"", "no safetensors file"
    yield "cut off", whole[:-4], "no safetensors file"
    yield "a header of 2 ** 62 bytes", struct.pack("<Q", 1 << 62) + whole[8:], "no safetensors file"
    yield "a header of 90 MB", struct.pack("<Q", 90 << 20) + b" " * 1000, "no safetensors file"
    yield "text", b"hello\x1b[31m" * 100, "no safetensors file"
    yield "a tensor alone", whole, "no pretraining model"
    name = "x\n\x1b[31m" + "y" * 100_000
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    yield "a long name", struct.pack("<Q", len(header)) + header + bytes(4), "no pretraining model"
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}).encode()
    yield "a shape of 1e18", struct.pack("<Q", len(header)) + header + bytes(4), "no safetensors file"
    header = b'{"a":' * 5000
    yield "a deep header", struct.pack("<Q", len(header)) + header, "no safetensors file"
