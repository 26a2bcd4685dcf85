"""Medians and the bar as a table of text, and as the data the plot is drawn from."""

import statistics

import bar

QUIET_SAMPLES = 3


def summarize(outcome):
    """Medians per contestant, threads and test.

    A sample counts as quiet when other processes took less than `quiet` cores during its run. Medians are over the quiet
    samples where these are at least QUIET_SAMPLES (or all there are), else over all; `quiet` and `all` say how many there were. Of variants of one
    contestant (llama.cpp with flash attention on and off) the one with the higher median stands for it.
    """
    cells, loads, systems = {}, {}, {}
    for run in outcome["samples"]:
        name, threads = run["contestant"], run["threads"]
        quiet = run["others"] is None or run["others"] < outcome["quiet"]
        systems[name] = run["system"]
        loads.setdefault((name, threads), []).append(run["load_seconds"])
        for r in run["results"]:
            cell = cells.setdefault((name, threads, r["test"]), {}).setdefault(r["variant"], [])
            cell.extend((s, quiet) for s in r["samples"])
    medians = []
    for (name, threads, test), variants in cells.items():
        rows = []
        for variant, samples in variants.items():
            calm = [s for s, quiet in samples if quiet]
            used = calm if len(calm) >= min(QUIET_SAMPLES, len(samples)) else [s for s, _ in samples]
            row = {"contestant": name, "threads": threads, "test": test, "variant": variant}
            row |= {"median": statistics.median(used), "min": min(used), "max": max(used)}
            rows.append(row | {"quiet": len(calm), "all": len(samples)})
        best = max(rows, key=lambda r: r["median"])
        medians.extend(row | {"stands": row is best} for row in rows)
    load = [
        {"contestant": name, "threads": threads, "median": statistics.median(samples), "min": min(samples)}
        for (name, threads), samples in loads.items()
    ]
    speeds = {(m["contestant"], m["threads"], m["test"]): m["median"] for m in medians if m["stands"]}
    load_times = {(entry["contestant"], entry["threads"]): entry["median"] for entry in load}
    noisy = {
        (m["contestant"], m["threads"], m["test"])
        for m in medians
        if m["stands"] and m["quiet"] < min(QUIET_SAMPLES, m["all"])
    }
    rows = {}
    for threads in sorted({m["threads"] for m in medians}):
        bandwidth = outcome.get("bandwidth") or {}
        # JSON has made texts of the numbers when the outcome was read from a file.
        reads = bandwidth.get(threads) or bandwidth.get(str(threads))
        rows[threads] = [
            row.as_json() | {"quiet": not any((c, threads, t) in noisy for c, t in row.uses)}
            for row in bar.rows(
                outcome["model"],
                threads,
                lambda *key: speeds.get(key),
                lambda *key: load_times.get(key),
                statistics.median(reads) if reads else None,
                outcome.get("weight_bytes"),
            )
        ]
    return {
        "machine": outcome["machine"],
        "model": outcome["model"],
        "medians": medians,
        "load": load,
        "systems": systems,
        "absent": outcome["absent"],
        "bar": rows,
    }


def rounds_done(outcome):
    """Rounds that were begun: a run that was ended early has fewer than were asked for."""
    return len({run["round"] for run in outcome["samples"]})


def table(head, rows):
    """Markdown that also reads well as plain text."""
    widths = [max(len(str(r[i])) for r in [head, *rows]) for i in range(len(head))]
    line = lambda cells: "| " + " | ".join(str(c).ljust(w) for c, w in zip(cells, widths)) + " |"
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def number(value):
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def bound(row):
    def with_sign(value):
        return "–" if value is None else f"{'≤' if row['at_most'] else '≥'} {value:.3g}"

    return [with_sign(row["must"]), with_sign(row["aim"])]


def markdown(outcome, summary):
    machine = summary["machine"]
    parts = [f"# {summary['model']} on {machine['cpu']}, {machine['cores']} cores\n"]
    for threads, rows in summary["bar"].items():
        parts.append(f"## Bar, {threads} threads\n")
        head = ["work", "peer", "Attar", "peer's", "unit", "ratio", "must", "aim", ""]
        cells = [
            [r["work"], r["peer"], number(r["attar"]), number(r["other"]), r["unit"], number(r["ratio"])]
            + [*bound(r), r["verdict"] + ("" if r["quiet"] or r["ratio"] is None else ", but others computed meanwhile")]
            for r in rows
        ]
        parts.append(table(head, cells) + "\n")
    parts.append(f"## Medians over {rounds_done(outcome)} rounds, tokens/s\n")
    head = ["contestant", "threads", "test", "variant", "median", "min", "max", "quiet samples"]
    cells = [
        [m["contestant"], m["threads"], m["test"], m["variant"], number(m["median"]), number(m["min"]), number(m["max"])]
        + [f"{m['quiet']} of {m['all']}"]
        for m in sorted(summary["medians"], key=lambda m: (m["test"], m["threads"], m["contestant"]))
    ]
    parts.append(table(head, cells) + "\n")
    parts.append("## Load time, seconds\n")
    cells = [[e["contestant"], e["threads"], number(e["median"]), number(e["min"])] for e in summary["load"]]
    parts.append(table(["contestant", "threads", "median", "min"], cells) + "\n")
    parts.append("## What ran\n")
    parts.extend(f"- {name}: {system.strip()}" for name, system in summary["systems"].items())
    if summary["absent"]:
        parts.append("\n## Absent\n")
        parts.extend(f"- {name}: {reason}" for name, reason in summary["absent"].items())
    return "\n".join(parts) + "\n"
