"""Write the manifest of a folder of audio files or of an uncompressed tar.

    python examples/write_manifest.py AUDIO_DIR_OR_TAR OUTPUT.{csv,jsonl,tsv} [--ext .flac]

Headers are read, nothing is decoded or unpacked. A tar's manifest holds byte offsets, by which its members are read in
place. Files that cannot be used are left out and named.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf.data.manifests import scan_folder, scan_tar
from spidr_hf.system.commands import HelpFormatter, output_path, user_path
from spidr_hf.system.errors import ManifestError
from spidr_hf.system.messages import counted, duration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("audio", type=user_path, metavar="AUDIO_DIR_OR_TAR", help="folder of audio files, or a .tar")
    parser.add_argument(
        "output", type=output_path, metavar="OUTPUT", help="manifest to write: .csv, .jsonl or .tsv (fairseq)"
    )
    parser.add_argument("--ext", nargs="+", help="only files with these suffixes (default: every audio format)")
    parser.add_argument("--resample", action="store_true", help="keep audio of any rate and number of channels")
    args = parser.parse_args()
    try:
        if not args.audio.exists():
            raise ManifestError(f"{args.audio}: no such folder or tar.")
        if args.output.suffix not in (".csv", ".jsonl", ".tsv"):
            raise ManifestError(f"{args.output}: a manifest is written as .csv, .jsonl or .tsv.")
        scan = scan_folder if args.audio.is_dir() else scan_tar
        manifest = scan(args.audio, suffixes=args.ext, resample=args.resample)
        manifest.write(args.output)
    except (ManifestError, OSError) as error:
        sys.exit(f"error: {error}")
    for fileid, reason in manifest.skipped:
        print(f"left out {fileid}: {reason}", file=sys.stderr)
    seconds = manifest.num_samples.sum() / 16_000
    print(
        f"{args.output}: {counted(len(manifest), 'utterance')}, {duration(seconds)}; "
        f"{counted(len(manifest.skipped), 'file')} left out"
    )


if __name__ == "__main__":
    main()
