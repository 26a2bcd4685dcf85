#!/usr/bin/env python3
"""A second reader of artifacts, written from docs/artifact.md with nothing but the standard library.

    read_artifact.py FILE            lists sections and tensors
    read_artifact.py FILE TENSOR     prints the decoded tensor, one row per line

It checks everything but hashes: the standard library has no BLAKE3.
"""

import json
import struct
import sys

PAGE, HEADER, CHANNELS = 4096, 128, 16
# name: (weights along K per group, bytes of a scale field, bits of a weight)
FORMATS = {"f32": (1, 0, 32), "bf16": (1, 0, 16), "w8": (32, 2, 8), **{f"n{b}": (32, 1, b) for b in range(2, 7)}}
# Bits of a code: first bit and width of each of its planes
PLANES = {2: [(0, 2)], 3: [(2, 1), (0, 2)], 4: [(0, 4)], 5: [(4, 1), (0, 4)], 6: [(4, 2), (0, 4)]}


def up(n, align):
    return (n + align - 1) // align * align


def bf16(bits):
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def f32(x):
    """Rounds to f32, as the reference computes."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def read_manifest(data):
    assert data[:8] == b"\x89ATTAR\r\n", "not an artifact"
    major, minor, offset, length, size = struct.unpack("<IIQQQ", data[8:40])
    assert major == 1, f"version {major}.{minor}"
    assert size == len(data) and offset % PAGE == 0 and offset + length == size, "truncated"
    manifest = json.loads(data[offset:].decode("utf-8"))
    assert not manifest.get("requires"), "requires more than this reader knows"
    end = HEADER
    for s in sorted(manifest["sections"], key=lambda s: s["offset"]):
        assert s["offset"] % PAGE == 0 and end <= s["offset"] and s["offset"] + s["len"] <= offset, s["kind"]
        assert not any(data[end:s["offset"]]), "padding"
        end = s["offset"] + s["len"]
    return manifest


def decode(tensor, data):
    """Rows of numbers from the tensor's packed bytes."""
    if len(tensor["shape"]) == 1:
        return [list(struct.unpack(f"<{tensor['shape'][0]}f", data))]
    n, k = tensor["shape"]
    name = tensor["format"]
    group, field, bits = FORMATS[name]
    coded = field == 1
    groups, per_lane = k // group if field else 0, 32 // bits
    start = up((1 << bits) + 1, 64) if coded else 0
    fields = 64 if coded else 0
    codes = fields + up(CHANNELS * groups * field, 64)
    block = codes + 64 * (groups * bits if coded else -(-k // per_lane))
    assert len(data) == start + -(-n // CHANNELS) * block, tensor["name"]
    *table, shift = struct.unpack_from(f"<{(1 << bits) + 1}b", data) if coded else (0,)
    rows = []
    for channel in range(n):
        base, c = start + channel // CHANNELS * block, channel % CHANNELS
        row_scale = struct.unpack_from("<f", data, base + 4 * c)[0] if coded else 0.0
        row = []
        for i in range(k):
            lane, within = base + codes + i // per_lane * 64 + c * 4, i % per_lane
            at = base + fields + (i // group * CHANNELS + c) * field
            if name == "f32":
                row.append(struct.unpack_from("<f", data, lane)[0])
            elif name == "bf16":
                row.append(bf16(struct.unpack_from("<H", data, lane + 2 * within)[0]))
            elif name == "w8":
                scale = bf16(struct.unpack_from("<H", data, at)[0])
                row.append(f32(scale * struct.unpack_from("<b", data, lane + within)[0]))
            else:
                code, plane = 0, base + codes + i // group * bits * 64 + c * 4 + i % 4
                pair, odd = i % group // 8, i % 8 // 4
                for low, width in PLANES[bits]:
                    byte = data[plane + pair * width // 4 * 64]
                    code |= (byte >> 4 * odd + pair * width % 4 & (1 << width) - 1) << low
                    plane += 64 * width
                scale = f32(row_scale * ((data[at] >> 2) - 32))
                row.append(f32(scale * (table[code] + (data[at] & 3) * shift)))
        rows.append(row)
    return rows


def main(path, wanted=None):
    data = open(path, "rb").read()
    manifest = read_manifest(data)
    weights = next((s["offset"] for s in manifest["sections"] if s["kind"] == "weights"), 0)
    if wanted is None:
        model = manifest["model"]
        print(f"{model['name']} ({model['architecture']}), by {manifest['generator']}")
        for s in manifest["sections"]:
            print(f"{s['offset']:>12} {s['len']:>12}  {s['kind']} {s.get('target', s.get('device', ''))}")
        for t in manifest["tensors"]:
            print(f"{t['offset']:>12} {t['len']:>12}  {t['format']:5} {t['shape']} {t['name']}")
        return
    tensor = next(t for t in manifest["tensors"] if t["name"] == wanted)
    start = weights + tensor["offset"]
    for row in decode(tensor, data[start:start + tensor["len"]]):
        print(" ".join(repr(x) for x in row))


if __name__ == "__main__":
    main(*sys.argv[1:])
