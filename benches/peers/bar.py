"""What Attar must reach against which peer, and how far it is.

Medians come in as `speed(contestant, threads, test)`: tokens per second, `None` where nothing was measured. A row whose
figures are missing says which.
"""

from dataclasses import dataclass


@dataclass
class Row:
    work: str
    peer: str
    attar: float | None
    other: float | None
    unit: str
    must: float
    aim: float | None
    # Whether a smaller ratio is better.
    at_most: bool = False
    missing: str = ""
    # (contestant, test) of the figures.
    uses: tuple = ()

    @property
    def ratio(self):
        return self.attar / self.other if self.attar and self.other else None

    def reaches(self, bound):
        if self.ratio is None or bound is None:
            return None
        return self.ratio <= bound if self.at_most else self.ratio >= bound

    @property
    def verdict(self):
        if self.ratio is None:
            return f"not measured: {self.missing}"
        return "aim reached" if self.reaches(self.aim) else "reached" if self.reaches(self.must) else "missed"

    def as_json(self):
        fields = ("work", "peer", "attar", "other", "unit", "ratio", "must", "aim", "at_most", "verdict")
        return {f: getattr(self, f) for f in fields}


def fastest(speed, contestants, threads, test):
    """The fastest contestant's name and speed."""
    known = [(speed(c, threads, test), c) for c in contestants]
    known = [(s, c) for s, c in known if s]
    return (max(known)[1], max(known)[0]) if known else (" or ".join(contestants), None)


LLAMA4 = ["llama/Q4_0", "llama/Q4_K_M"]
LLAMA = [*LLAMA4, "llama/Q8_0"]
AVX2 = ["llama-avx2/Q4_0", "llama-avx2/Q4_K_M"]
# (model, test, Attar's contestant, peers, must, aim)
AGAINST = [
    ("smollm2", "tg128", "attar/n4", LLAMA4, 2.0, 2.5),
    ("smollm2", "tg128", "attar/w8", ["llama/Q8_0"], 1.8, 2.2),
    ("smollm2", "pp512", "attar/n4", ["openvino/int4"], 1.5, 2.5),
    ("smollm2", "pp512", "attar/n4", LLAMA, 4.0, 7.0),
    ("smollm2", "tg128@4096", "attar/n4", LLAMA, 2.0, None),
    ("1b", "pp512", "attar/n4", ["openvino/int4"], 1.2, 2.0),
    ("smollm2", "pp512", "attar-v3/n4", AVX2, 1.3, None),
    ("smollm2", "tg128", "attar-v3/n4", AVX2, 1.3, None),
]


def rows(model, threads, speed, load_seconds, bandwidth, weight_bytes):
    """`bandwidth`: measured bytes per second of reads; `weight_bytes`: what one decode step of `attar/n4` reads."""
    made = []
    for of, test, ours, peers, must, aim in AGAINST:
        if of != model:
            continue
        name, other = fastest(speed, peers, threads, test)
        attar = speed(ours, threads, test)
        missing = ", ".join(n for n, v in ((ours, attar), (name, other)) if not v)
        uses = ((ours, test), (name, test))
        made.append(Row(f"{test}, {ours}", name, attar, other, "tok/s", must, aim, missing=missing, uses=uses))
    if model == "smollm2":
        one, four = speed("attar/n4", threads, "tg128"), speed("attar/n4", threads, "tg128x4")
        times = (4e3 / four if four else None, 1e3 / one if one else None)
        missing = "attar/n4 tg128x4"
        uses = (("attar/n4", "tg128"), ("attar/n4", "tg128x4"))
        made.append(Row("decode step, 4 rows", "1 row", *times, "ms", 1.3, 1.15, True, missing, uses))
        ours, theirs = load_seconds("attar/n4", threads), load_seconds("openvino/int4", threads)
        missing = ", ".join(n for n, v in (("attar/n4", ours), ("openvino/int4", theirs)) if not v)
        made.append(Row("open to ready", "openvino/int4", ours, theirs, "s", 1 / 20, None, True, missing))
    else:
        decode = speed("attar/n4", threads, "tg64")
        used = decode * weight_bytes / 1e9 if decode and weight_bytes else None
        read = bandwidth / 1e9 if bandwidth else None
        missing = "attar/n4 tg64" if not used else "read bandwidth"
        uses = (("attar/n4", "tg64"),)
        made.append(Row("tg64, bytes of weights", "pure read", used, read, "GB/s", 0.8, 0.9, missing=missing, uses=uses))
    return made
