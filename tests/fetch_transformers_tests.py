"""Fetch the common test suites of the installed transformers, which ship in its source distribution only.

    python tests/fetch_transformers_tests.py

`make test` runs it once. The files go into the virtual environment; `tests/test_common_suite.py` runs them on the
classes of this package, and skips, saying so, where they are missing. The suites change with every release, so the
version fetched is the one installed.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

FILES = (
    "test_modeling_common.py",
    "test_configuration_common.py",
    "test_feature_extraction_common.py",
    "test_sequence_feature_extraction_common.py",
)
FOLDER = Path(sys.prefix, "share", f"transformers-tests-{version('transformers')}")


def fetch(folder: Path = FOLDER) -> None:
    """Downloads the source distribution with pip and keeps `FILES` of it in `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", temporary, f"transformers=={version('transformers')}"], check=True)
        (archive,) = Path(temporary).glob("transformers-*.tar.gz")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            root = archive.name.removesuffix(".tar.gz")
            for name in FILES:
                member = tar.extractfile(f"{root}/tests/{name}")
                assert member is not None
                (folder / name).write_bytes(member.read())
    # Last, as the sign that the folder is complete. The suite takes the folder for the transformers package itself.
    (folder / "__init__.py").touch()


def main() -> None:
    if (FOLDER / "__init__.py").exists():
        return
    try:
        fetch()
    except (subprocess.CalledProcessError, OSError, KeyError, ValueError) as error:
        print(
            f"transformers' common tests could not be fetched ({error}): their tests will be skipped.", file=sys.stderr
        )


if __name__ == "__main__":
    main()
