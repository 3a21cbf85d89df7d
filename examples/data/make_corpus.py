#!/usr/bin/env python3
"""Make a synthetic English speech corpus with phone alignments, from Debian packages only.

apt-get install flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts festlex-cmu \
    festlex-poslex espeak-ng bible-kjv bible-kjv-text
pip install numpy scipy soundfile

Engines: flite (rms, slt, awb, kal16), festival (kal, ked, slt_hts), espeak-ng (phoneme events through ctypes).
Text: King James Bible (public domain), sentences of 4..25 words; the three parts (dev/small/large) never share a
sentence.  Deterministic for a given --seed (and package versions).

    make_corpus.py OUT --part small --minutes 6 --voices slt,rms,awb,kal,ked,slt_hts --tar
"""

import argparse
import csv
import ctypes
import hashlib
import io
import json
import random
import re
import subprocess
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly

SR = 16_000
ARPA = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH".split()
SIL = "SIL"
# Radio/CMU phone set of flite and festival -> the 39 CMU phones
RADIO = {p.lower(): (p,) for p in ARPA} | {
    "ax": ("AH",), "axr": ("ER",), "ix": ("IH",), "ux": ("UW",), "dx": ("T",), "nx": ("N",), "hv": ("HH",),
    "el": ("L",), "em": ("M",), "en": ("N",), "pau": (SIL,), "h#": (SIL,), "brth": (SIL,), "sil": (SIL,), "ssil": (SIL,),
}  # fmt: skip
# espeak-ng en-us mnemonics -> CMU phones (r-coloured vowels become two phones)
ESPEAK = {
    "a": "AE", "aa": "AE", "a#": "AH", "@": "AH", "@2": "AH", "@5": "AH", "@-": "AH", "V": "AH", "A:": "AA", "A": "AA", "0": "AA",
    "0#": "AA", "O": "AO", "O:": "AO", "O2": "AO", "aI": "AY", "aU": "AW", "eI": "EY", "e": "EH", "E": "EH", "E#": "EH", "E2": "EH",
    "I": "IH", "I2": "IH", "I#": "IH", "i": "IY", "i:": "IY", "oU": "OW", "oU#": "OW", "OI": "OY", "U": "UH", "u:": "UW", "u": "UW",
    "3": "ER", "3:": "ER", "@L": "AH L", "A@": "AA R", "O@": "AO R", "o@": "AO R", "e@": "EH R", "i@3": "IH R", "i@": "IY AH",
    "U@": "UH R", "aI@": "AY AH", "aI3": "AY ER", "aU@": "AW ER", "oI@": "OY AH", "b": "B", "d": "D", "D": "DH", "f": "F", "g": "G", "h": "HH",
    "j": "Y", "k": "K", "l": "L", "l#": "L", "m": "M", "n": "N", "n-": "N", "N": "NG", "p": "P", "r": "R", "r-": "R", "s": "S", "S": "SH",
    "t": "T", "t2": "T", "t#": "T", "?": "T", "T": "TH", "v": "V", "w": "W", "w#": "W", "z": "Z", "Z": "ZH", "tS": "CH", "dZ": "JH",
    "x": "K", "_": SIL, "_:": SIL, "_!": SIL, "_|": SIL, "_::": SIL, ";": None, "": None,
}  # fmt: skip


# ----------------------------------------------------------------------------- text
def sentences() -> list[str]:
    raw = subprocess.run(["bible", "-l400", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    out: dict[str, str] = {}
    for line in raw.splitlines():
        m = re.match(r"^\s+\d+ (.*)$", line)
        if not m:
            continue
        for s in re.findall(r"[A-Z(][^.?!]*[.?!]", m[1]):
            s = re.sub(r"\b([A-Z])([A-Z]+)\b", lambda k: k[1] + k[2].lower(), s)
            s = re.sub(r"[()\[\]{}#*\"]", "", s).strip()
            if re.search(r"[^A-Za-z ,;:'.?!-]", s) or not 4 <= len(s.split()) <= 25:
                continue
            out.setdefault(re.sub(r"[^a-z ]", "", s.lower()), s)
    return sorted(out.values())


def split_text(seed: int) -> dict[str, list[str]]:
    texts = sentences()
    random.Random(f"text-{seed}").shuffle(texts)
    n = len(texts)
    return {"dev": texts[: n // 8], "small": texts[n // 8 : n // 8 + n // 24], "large": texts[n // 8 + n // 24 :]}


# ----------------------------------------------------------------------------- engines
# Each engine takes [(text, rate, f0)] and yields (float waveform, sample rate, [(phone, end_s)]).
# rate > 1 is slower. f0 is a factor around 1 (ignored where the voice has no such knob).
def flite(voice, jobs, tmp):
    for text, rate, f0 in jobs:
        wav = tmp / "f.wav"
        cmd = ["flite", "-voice", voice, "--setf", f"duration_stretch={rate:.3f}", "--setf", f"f0_shift={f0:.3f}"]
        res = subprocess.run([*cmd, "-psdur", "-t", text, "-o", str(wav)], check=True, capture_output=True, text=True)
        segs = [(p, float(e)) for p, e in re.findall(r"(\S+?):([\d.]+)", res.stdout)]
        x, sr = sf.read(wav)
        yield x, sr, [(RADIO[p], e) for p, e in segs]


FEST = {
    "kal": ("voice_kal_diphone", 105, 14),
    "ked": ("voice_ked_diphone", 105, 15),
    "slt_hts": ("voice_cmu_us_slt_arctic_hts", None, None),
}


def festival(voice, jobs, tmp):
    init, mean, std = FEST[voice]
    scm = [
        "(define (segs u) (mapcar (lambda (s) (list (item.name s) (item.feat s 'end))) (utt.relation.items u 'Segment)))",
        f"({init})",
        "(set! base_params hts_engine_params)" if mean is None else "(set! base_params nil)",
    ]
    for i, (text, rate, f0) in enumerate(jobs):
        if mean is None:
            scm.append(f'(set! hts_engine_params (append base_params (list \'("-r" {1 / rate:.3f}))))')
        else:
            f0_params = f"(target_f0_mean {mean * f0:.1f}) (target_f0_std {std * f0:.1f})"
            scm.append(f"(set! int_lr_params '({f0_params} (model_f0_mean 170) (model_f0_std 34)))")
            scm.append(f"(Parameter.set 'Duration_Stretch {rate:.3f})")
        scm.append(f'(set! u (SynthText "{text}"))')
        scm.append(f'(utt.save.wave u "{tmp}/{i}.wav" \'riff)')
        scm.append(f'(format t "SEG {i} %l\\n" (segs u))')
    (tmp / "job.scm").write_text("\n".join(scm))
    res = subprocess.run(["festival", "-b", str(tmp / "job.scm")], check=True, capture_output=True, text=True)
    lines = {int(m[1]): m[2] for m in re.finditer(r"^SEG (\d+) (.*)$", res.stdout, re.M)}
    for i in range(len(jobs)):
        x, sr = sf.read(tmp / f"{i}.wav")
        late = 0.010 if voice == "slt_hts" else 0.0  # measured: HTS audio lags its labels by two 5 ms frames
        yield x, sr, [(RADIO[p], float(e) + late) for p, e in re.findall(r'\("(\S+)" ([\d.]+)\)', lines[i])]


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("uid", ctypes.c_uint), ("text_position", ctypes.c_int), ("length", ctypes.c_int),
                ("audio_position", ctypes.c_int), ("sample", ctypes.c_int), ("user_data", ctypes.c_void_p), ("id", _Id)]  # fmt: skip


_espeak = {}
STOPS = set("B D G K P T CH JH".split())


def espeak(voice, jobs, tmp):
    if not _espeak:
        lib = ctypes.CDLL("libespeak-ng.so.1")
        sr = lib.espeak_Initialize(2, 0, None, 1)  # synchronous, phoneme events
        buf, events = [], []

        def callback(wav, n, ev):
            if wav and n > 0:
                buf.append(ctypes.string_at(wav, n * 2))
            i = 0
            while ev[i].type != 0:
                if ev[i].type == 7:
                    events.append((ev[i].id.string.decode("utf8", "replace"), ev[i].sample))
                i += 1
            return 0

        proto = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        cb = proto(callback)
        lib.espeak_SetSynthCallback(cb)
        _espeak.update(lib=lib, sr=sr, buf=buf, events=events, cb=cb)
    lib, sr, buf, events = (_espeak[k] for k in ("lib", "sr", "buf", "events"))
    lib.espeak_SetVoiceByName(voice.encode())
    for text, rate, f0 in jobs:
        buf.clear(), events.clear()
        lib.espeak_SetParameter(1, round(160 / rate), 0)  # words per minute
        lib.espeak_SetParameter(3, round(50 + 60 * (f0 - 1)), 0)  # pitch 0..100
        b = text.encode()
        lib.espeak_Synth(b, len(b) + 1, 0, 1, 0, 1 | 0x1000, None, None)
        x = np.frombuffer(b"".join(buf), dtype=np.int16) / 32768
        # espeak's event of a stop marks the burst: move it back over the silence of the closure (digital zeros)
        quiet = np.abs(x) < 1e-3 * np.abs(x).max()
        for i, (name, pos) in enumerate(events):
            if ESPEAK[name] in STOPS and i > 0 and ESPEAK[events[i - 1][0]] != SIL:
                loud = np.flatnonzero(~quiet[events[i - 1][1] : max(pos - sr // 200, events[i - 1][1])])
                closure = events[i - 1][1] + int(loud[-1]) + 1 if len(loud) else pos
                if pos - closure > sr // 66:
                    events[i] = (name, max(closure, events[i - 1][1] + sr // 100))
        segs, ends = [], [s for _, s in events[1:]] + [len(x)]
        start = 0
        for (name, _), end in zip(events, ends, strict=True):
            phones = ESPEAK[name]
            if end <= start:
                continue
            if phones is None:  # palatal off-glide mark and the like: part of the phone before
                phones, segs = segs[-1][0] if segs else (SIL,), segs[:-1]
                phones = phones[-1:]
                segs.append((phones, end / sr))
            else:
                segs.append((tuple(phones.split()), end / sr))
            start = end
        yield x, sr, segs


VOICES = {  # name: (engine, engine voice, speaker, licence family)
    "slt": (flite, "slt", "slt"), "rms": (flite, "rms", "rms"), "awb": (flite, "awb", "awb"), "kal16": (flite, "kal16", "kal"),
    "kal": (festival, "kal", "kal"), "ked": (festival, "ked", "ked"), "slt_hts": (festival, "slt_hts", "slt"),
    "esm": (espeak, "en-us+m3", "esm"), "esf": (espeak, "en-us+f1", "esf"),
}  # fmt: skip


# ----------------------------------------------------------------------------- post-processing
def finish(x, sr, segs, speed100, level_db, seed):
    """Resample (with a small speed change), set the level, add a faint noise floor, and clean the alignment."""
    up, down = SR * 100, sr * speed100
    g = np.gcd(up, down)
    y = resample_poly(x, up // g, down // g)
    y = y - y.mean()
    active = np.sqrt(np.mean(y[np.abs(y) > 0.01 * np.abs(y).max()] ** 2))
    y = y * min(10 ** (level_db / 20) / active, 0.97 / np.abs(y).max())
    y = np.round(y * 32767 + np.random.default_rng(seed).normal(0, 2.0, len(y))).clip(-32768, 32767).astype(np.int16)
    total, ali, start = len(y) / SR, [], 0.0
    for phones, end in segs:
        end = min(end * 100 / speed100, total)
        if end <= start:
            continue
        cut = [start + (end - start) * f for f in ([1.0] if len(phones) == 1 else [0.6, 1.0])]
        for phone, stop in zip(phones, cut, strict=True):
            if ali and ali[-1][0] == phone and (phone == SIL or len(phones) == 2):
                ali[-1][2] = stop
            else:
                ali.append([phone, start, stop])
            start = stop
    if ali[-1][0] == SIL:
        ali[-1][2] = total
    elif total - start > 0.005:
        ali.append([SIL, start, total])
    return y, [[p, round(s, 4), round(e, 4)] for p, s, e in ali]


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=Path)
    ap.add_argument("--part", choices=["small", "large", "dev"], required=True)
    ap.add_argument("--minutes", type=float, required=True)
    ap.add_argument("--voices", default="slt,rms,awb,kal,ked,slt_hts,esm,esf")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--format", choices=["flac", "wav"], default="flac")
    ap.add_argument(
        "--tar", action="store_true", help="also write OUT.tar (uncompressed) and a manifest with byte offsets"
    )
    args = ap.parse_args()
    voices = args.voices.split(",")
    texts = split_text(args.seed)[args.part]
    args.out.mkdir(parents=True, exist_ok=True)
    rows, t0, seconds = [], time.time(), 0.0
    with (args.out / "alignments.jsonl").open("w") as fa:
        for voice in voices:
            engine, name, speaker = VOICES[voice]
            pool = texts[voices.index(voice) :: len(voices)]  # a voice's sentences are its own
            rng = random.Random(f"{args.seed}-{args.part}-{voice}")
            (args.out / voice).mkdir(exist_ok=True)
            target, done, n, v0 = args.minutes * 60 / len(voices), 0.0, 0, time.time()
            while done < target:
                batch = pool[n : n + 25]
                if not batch:
                    print(f"{voice}: out of sentences")
                    break
                jobs = [(t, rng.uniform(0.9, 1.2), rng.uniform(0.88, 1.15)) for t in batch]
                post = [(rng.randint(96, 104), rng.uniform(-26, -20)) for _ in batch]
                with tempfile.TemporaryDirectory() as tmp:
                    for (x, sr, segs), (text, rate, f0), (sp, db) in zip(
                        engine(name, jobs, Path(tmp)), jobs, post, strict=True
                    ):
                        if done >= target:
                            break
                        uid = f"{args.part}-{voice}-{n:05d}"
                        y, ali = finish(x, sr, segs, sp, db, zlib.crc32(f"{args.seed}{uid}".encode()))
                        path = args.out / voice / f"{uid}.{args.format}"
                        sf.write(path, y, SR, subtype="PCM_16")
                        info = {"id": uid, "voice": voice, "speaker": speaker, "text": text, "num_samples": len(y),
                                "rate": round(rate, 3), "f0": round(f0, 3), "speed": sp / 100, "phones": ali}  # fmt: skip
                        fa.write(json.dumps(info) + "\n")
                        rows.append((uid, path, len(y)))
                        done += len(y) / SR
                        n += 1
            seconds += done
            print(f"{voice}: {n} utterances, {done / 60:.2f} min, made in {time.time() - v0:.1f} s", flush=True)
    with (args.out / "manifest.csv").open("w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["fileid", "path", "num_samples"])
        w.writerows((u, str(p.resolve()), n) for u, p, n in rows)
    size = sum(p.stat().st_size for _, p, _ in rows)
    digest = hashlib.sha256(b"".join(p.read_bytes() for _, p, _ in sorted(rows))).hexdigest()
    print(f"{args.part}: {len(rows)} utterances, {seconds / 60:.1f} min, {size / 1e6:.1f} MB of {args.format}, "
          f"{time.time() - t0:.0f} s ({seconds / (time.time() - t0):.0f}x real time), sha256 {digest[:16]}")  # fmt: skip
    if args.tar:
        tar_path = args.out.with_suffix(".tar")
        with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:

            def add(name: str, data: bytes) -> None:
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.mode = len(data), 0, 0o644
                tar.addfile(info, io.BytesIO(data))

            for _, p, _ in sorted(rows):
                add(f"{p.parent.name}/{p.name}", p.read_bytes())
        samples = {p.name: n for _, p, n in rows}
        with tarfile.open(tar_path) as tar, args.out.with_name(args.out.name + "_tar.csv").open("w", newline="") as f:
            w = csv.writer(f)
            w.writerow(["fileid", "path", "num_samples", "archive", "byte_offset", "byte_size"])
            for m in tar.getmembers():
                p = Path(m.name)
                w.writerow([p.stem, m.name, samples[p.name], tar_path.name, m.offset_data, m.size])
        print(f"{tar_path}: {tar_path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
