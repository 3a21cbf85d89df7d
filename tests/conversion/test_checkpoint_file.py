"""However a checkpoint is packed, its tensors are those that were saved, to the bit; or it is refused."""

import json
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spidr_hf.conversion import convert_checkpoint, export_checkpoint
from spidr_hf.conversion.checkpoint_file import open_checkpoint, read_checkpoint
from spidr_hf.conversion.checkpoints import read_pretraining_checkpoint
from spidr_hf.conversion.errors import ConversionError, NonFiniteError
from spidr_hf.conversion.model_folder import load_folder
from spidr_hf.conversion.tensors import same_bits

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
CHECKPOINTS = {"SpidR's": PARITY / "spidr-tiny" / "checkpoint.pt", "fairseq": PARITY / "dinosr-fairseq/checkpoint.ckpt"}
PACKINGS = {
    "stored anew": zipfile.ZIP_STORED,
    "deflated": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


def repack(source: Path, target: Path, packing: int, only: str = "") -> Path:
    """The same archive written by another tool; only the entries with `only` in their names are packed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), packing if only in name else zipfile.ZIP_STORED)
    return target


def with_config(checkpoint: Path) -> Path:
    """`checkpoint` with the tiny model's configuration beside it."""
    (checkpoint.parent / "config.json").write_bytes((PARITY / "spidr-tiny" / "config.json").read_bytes())
    return checkpoint


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("only", ["", "data/1", "data.pkl"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_packed_archives_hold_the_same_numbers(kind: str, only: str, packing: str, tmp_path: Path) -> None:
    expected = read_pretraining_checkpoint(CHECKPOINTS[kind]).tensors
    packed = repack(CHECKPOINTS[kind], with_config(tmp_path / "packed.pt"), PACKINGS[packing], only)
    found = read_pretraining_checkpoint(packed)  # as `run.init_ckpt` reads it
    assert found.tensors.keys() == expected.keys()
    assert all(same_bits(found.tensors[name], tensor) for name, tensor in expected.items())


def test_a_packed_archive_converts_to_the_same_file(tmp_path: Path) -> None:
    packed = repack(CHECKPOINTS["SpidR's"], with_config(tmp_path / "packed.pt"), zipfile.ZIP_DEFLATED)
    for name, source in (("packed", packed), ("plain", CHECKPOINTS["SpidR's"])):
        convert_checkpoint.convert(str(source), str(tmp_path / name))
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "plain")]
    assert written[0] == written[1]


def test_other_ways_of_saving(tmp_path: Path) -> None:
    checkpoint = torch.load(CHECKPOINTS["SpidR's"], weights_only=True)
    expected = read_pretraining_checkpoint(CHECKPOINTS["SpidR's"]).tensors
    path = with_config(tmp_path / "x.pt")
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    found = [read_pretraining_checkpoint(path).tensors]
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint, path)
    finally:
        torch.serialization.set_crc32_options(True)
    found.append(read_pretraining_checkpoint(path).tensors)
    for tensors in found:
        assert all(same_bits(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("checksums", [True, False])
def test_windows_into_the_file_are_checked(checksums: bool, tmp_path: Path) -> None:
    """Damage in the middle of the numbers, which no size and no structure tells."""
    tensors = {"a": torch.randn(1000), "b": torch.randn(1000)}
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(tensors, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        checkpoint.check(checkpoint.content.values())
        checkpoint.content["b"][500] += 1  # as if another place of the file had been taken for it
        checkpoint.check([checkpoint.content["a"]])
        with pytest.raises(ConversionError, match=r"x\.pt: x/data/1 does not have its checksum"):
            checkpoint.check(checkpoint.content.values())


def test_damaged_numbers_are_refused(tmp_path: Path) -> None:
    data = bytearray(CHECKPOINTS["SpidR's"].read_bytes())
    head = read_pretraining_checkpoint(CHECKPOINTS["SpidR's"]).tensors["heads.bias"]
    data[data.index(head[1].numpy().tobytes()) + 3] ^= 1
    path = with_config(tmp_path / "damaged.pt")
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="checksum"):
        read_pretraining_checkpoint(path)
    packed = repack(CHECKPOINTS["SpidR's"], path, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(packed) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(packed.read_bytes())
    data[entry.header_offset + 200] ^= 255
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="damaged"):
        read_pretraining_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_every_type_of_numbers(legacy: bool, tmp_path: Path) -> None:
    kinds = [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    kinds += [torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(kind): torch.randint(0, 2, (3, 5)).to(kind)[1:, ::2] for kind in kinds}
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(tmp_path / "x.pt")
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(5.0)}, tmp_path / "x.pt")
    tensor = read_checkpoint(tmp_path / "x.pt")["a"]
    tensor += 1
    (tmp_path / "x.pt").unlink()
    assert tensor.tolist() == [1, 2, 3, 4, 5]


# ---- numbers that are none


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300"])
def test_non_finite_tensors_are_refused_unless_asked_for(kind: torch.dtype, value: str, tmp_path: Path, capsys) -> None:
    checkpoint = torch.load(CHECKPOINTS["SpidR's"], weights_only=True)
    bad = checkpoint["model"]["student.layer_norm.bias"].to(kind)
    bad[3] = torch.tensor(float(value), dtype=torch.float64).to(kind)
    if torch.isfinite(bad.float()).all():
        pytest.skip("this type has no such number")
    checkpoint["model"]["student.layer_norm.bias"] = bad
    path = with_config(tmp_path / "x.pt")
    torch.save(checkpoint, path)
    output = tmp_path / "o"
    assert convert_checkpoint.main([str(path), str(output)]) == 1
    error = capsys.readouterr().err
    assert "not finite" in error and "spidr.encoder.layer_norm.bias" in error and "--allow-non-finite" in error
    assert error.count("\n") == 1 and not output.exists()
    assert convert_checkpoint.main([str(path), str(output), "--allow-non-finite"]) == 0
    assert "note: spidr.encoder.layer_norm.bias hold numbers that are not finite" in capsys.readouterr().err
    written = load_file(output / "model.safetensors")["spidr.encoder.layer_norm.bias"]
    assert torch.equal(written.isfinite(), bad.float().isfinite())


def test_non_finite_tensors_of_fairseq_are_refused(tmp_path: Path) -> None:
    checkpoint = torch.load(CHECKPOINTS["fairseq"], weights_only=True)
    checkpoint["model"]["_ema"]["layer_norm.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(NonFiniteError, match=r"teacher\.layer_norm\.bias"):
        read_pretraining_checkpoint(tmp_path / "x.ckpt")
    assert read_pretraining_checkpoint(tmp_path / "x.ckpt", allow_non_finite=True).notes


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float64])
def test_non_finite_tensors_of_a_model_folder_are_refused(kind: torch.dtype, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "model"
    convert_checkpoint.convert(str(CHECKPOINTS["SpidR's"]), str(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors["teacher.layer_norm.weight"] = tensors["teacher.layer_norm.weight"].to(kind)
    tensors["teacher.layer_norm.weight"][1] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"teacher\.layer_norm\.weight"):
        load_folder(folder)  # as `run.init_ckpt` reads it
    output = tmp_path / "out" / "x.pt"
    assert export_checkpoint.main([str(folder), str(output)]) == 1
    assert "--allow-non-finite" in capsys.readouterr().err and not output.parent.exists()
    assert export_checkpoint.main([str(folder), str(output), "--allow-non-finite"]) == 0
    exported = torch.load(output, weights_only=True)["model"]["teacher.layer_norm.weight"]
    assert same_bits(exported, tensors["teacher.layer_norm.weight"])


# ---- Git LFS


def test_pointers_of_git_lfs_are_told(tmp_path: Path, capsys) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1202858\n"
    folder = tmp_path / "model"
    convert_checkpoint.convert(str(CHECKPOINTS["SpidR's"]), str(folder))
    checkpoint = with_config(tmp_path / "checkpoint.pt")
    checkpoint.write_bytes(CHECKPOINTS["SpidR's"].read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    capsys.readouterr()  # the progress bars of that

    def refused(path: Path, command, *arguments: Path) -> None:
        whole = path.read_bytes()
        path.write_text(pointer)
        assert command.main([str(argument) for argument in arguments]) == 1
        error = capsys.readouterr().err
        assert f"{path} is a Git LFS pointer" in error and "git lfs pull" in error and error.count("\n") == 1
        path.write_bytes(whole)

    for path in (checkpoint, checkpoint.with_name("config.json")):
        refused(path, convert_checkpoint, checkpoint, tmp_path / "o")
    for name in ("model.safetensors.index.json", "model.safetensors", "config.json"):
        refused(folder / name, export_checkpoint, folder, tmp_path / "out" / "x.pt")
    assert not (tmp_path / "o").exists() and not (tmp_path / "out").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_checkpoint.export(folder, tmp_path / "out" / "x.pt")
