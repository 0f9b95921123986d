"""The results as one JSON file and one Markdown file."""

import json
from collections.abc import Callable
from pathlib import Path

NOT_MEASURED = "not measured"
Row = dict


def seconds(value: float | None) -> str:
    """ "12.3 ms" and the like."""
    if value is None:
        return NOT_MEASURED
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"
    return f"{value / 1e-6:.3g} us"


def number(value: float | None, unit: str = "", scale: float = 1.0) -> str:
    if value is None:
        return NOT_MEASURED
    value /= scale
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}") + (f" {unit}" if unit else "")


def percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:.3g}%"


def _time(row: Row) -> str:
    if row.get("median_s") is None:
        return NOT_MEASURED
    return f"{seconds(row['median_s'])} [{seconds(row['min_s'])} .. {seconds(row['max_s'])}]"


def _clean(row: Row) -> str:
    if row.get("rounds") is None:
        return NOT_MEASURED
    return f"{NOT_MEASURED} ({row['rounds']} samples)" if row["clean"] is None else f"{row['clean']} of {row['rounds']}"


def _error(row: Row) -> str:
    return ", ".join(f"{e:.1g}" for e in row["errors"]) if row.get("errors") else NOT_MEASURED


Column = tuple[str, Callable[[Row], str]]
NAME: Column = ("variant", lambda row: row["name"])
TIME: Column = ("median [min .. max]", _time)
CLEAN: Column = ("clean samples", _clean)
ERROR: Column = ("difference", _error)
NETWORK: list[Column] = [
    NAME,
    TIME,
    ("images/s", lambda row: number(row.get("per_s"))),
    ("GFLOP/s", lambda row: number(row.get("flops_per_s"), scale=1e9)),
    ("of the matmul rate", lambda row: percent(row.get("matmul_fraction"))),
    ("of the floor", lambda row: percent(row.get("floor_fraction"))),
    ("peak memory", lambda row: number(row.get("peak_memory_bytes"), "MiB", 2**20)),
    ("warm-up", lambda row: seconds(row.get("warm_up_s"))),
    ERROR,
    CLEAN,
]
COLUMNS: dict[str, list[Column]] = {
    "infer": NETWORK,
    "train": NETWORK,
    "sample": [NAME, TIME, ("images/s", lambda row: number(row.get("per_s"))), CLEAN],
    "data": [NAME, TIME, ("images/s", lambda row: number(row.get("per_s"))), CLEAN],
    "op": [
        ("tensor", lambda row: f"{'x'.join(map(str, row['shape']))} {row['memory_format']}"),
        NAME,
        TIME,
        ("GB/s", lambda row: number(row.get("bytes_per_s"), scale=1e9)),
        ("of the copy's bandwidth", lambda row: percent(row.get("copy_fraction"))),
        ERROR,
        CLEAN,
    ],
    "grow": [
        ("axis", lambda row: row["axis"]),
        ("value", lambda row: f"{row['value']:,}"),
        ("pass", lambda row: row["pass"]),
        TIME,
        CLEAN,
    ],
}


def table(columns: list[Column], rows: list[Row]) -> str:
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row).replace("|", "/") for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio_line(ratio: dict) -> str:
    """One paired ratio as a sentence."""
    clean = (
        f"how many were clean: {NOT_MEASURED}" if ratio["clean"] is None else f"{ratio['clean']} clean on both sides"
    )
    rounds_note = f"({ratio['used']} of {ratio['rounds']} rounds used; {clean})"
    place = f"{'x'.join(map(str, ratio['shape']))} {ratio['memory_format']}: " if "shape" in ratio else ""
    if "overhead" in ratio:
        low, high = ratio["overhead_range"]
        return f"{place}{ratio['ours']} takes {percent(ratio['overhead'])} [{percent(low)} .. {percent(high)}] over {ratio['peer']} {rounds_note}."
    line = (
        f"{place}{ratio['ours']} is {ratio['median']:.2f}x [{ratio['min']:.2f} .. {ratio['max']:.2f}] as fast as "
        f"{ratio['peer']} {rounds_note}"
    )
    if "flops_ratio" in ratio:
        line += f"; per FLOP of its own network {ratio['flops_ratio']:.2f}x (another network: it cannot hold the same weights)"
    return f"**{line}.**" if ratio.get("best") else f"{line}."


def heading(group: dict) -> str:
    parts = [
        group["task"],
        group.get("size"),
        group.get("dtype"),
        f"batch {group['batch']}" if group.get("batch") else None,
    ]
    parts.append(f"{group['threads']} thread{'s' if group['threads'] > 1 else ''}" if group.get("threads") else None)
    return ", ".join(str(part) for part in parts if part)


def markdown(results: dict) -> str:
    """The whole report."""
    m = results["machine"]
    gpu = f"{m['gpu']} (CUDA {m['cuda']})" if m["gpu"] else NOT_MEASURED
    bf16 = "" if m["cpu_bf16"] else " without bf16 instructions: bf16 is emulated, many times slower"
    lines = [
        "# Benchmarks",
        "",
        table(
            [("what", lambda r: r[0]), ("value", lambda r: str(r[1]))],
            [
                ("date", results["date"]),
                ("command", f"`{results['command']}`"),
                ("machine", f"{m['machine']}, load {m.get('load_average', NOT_MEASURED)} at the start"),
                ("CPU", f"{m['cpu']}, {m['cores']} cores, {m['cpu_capability']}{bf16}"),
                ("GPU", gpu),
                ("torch", m["torch"]),
                ("diffusers", m["diffusers"]),
                ("threads", ", ".join(map(str, results["threads"]))),
            ],
        ),
        "",
        "benchmarks/README.md explains the numbers. A ratio above 1 means that ours is faster; bold: our best against the peer's best.",
    ]
    if results["limits"]:
        columns = [("limit", lambda r: r["name"]), ("measured", lambda r: number(r["rate"], r["unit"], r["scale"]))]
        lines += ["", "## This machine's limits", "", table(columns, results["limits"])]
    for group in results["groups"]:
        lines += ["", f"## {heading(group)}", ""]
        if group["rows"]:
            lines += [table(COLUMNS[group["task"]], group["rows"]), ""]
        lines += [f"- {ratio_line(ratio)}" for ratio in group["ratios"]]
        lines += [f"- {sentence}" for sentence in group.get("sentences", ())]
        lines += [f"- {NOT_MEASURED}: {sentence}." for sentence in group["not_measured"]]
        if group.get("plot"):
            lines += ["", f"![{heading(group)}]({group['plot']})"]
    lines += ["", "## Not measured", ""]
    lines += [f"- {sentence}" for sentence in results["not_measured"]] or ["- Everything requested was measured."]
    return "\n".join(lines) + "\n"


def write(results: dict, folder: Path) -> None:
    """Write results.json and results.md; called after every table, so that a stopped run has its finished tables."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", markdown(results))):
        tmp = folder / f".{name}"
        tmp.write_text(text + "\n" if name.endswith("json") else text, encoding="utf-8")
        tmp.replace(folder / name)
